"""The contract between a hospital and the server: all that a site may be asked, all that leaves it.

A site's data officer can read this one file to know what crosses the wire. Every type here travels as JSON
plus raw little-endian float32 numbers, or what client/encoding.py makes of them where the task says so: no pickle, no
header inside their bytes that could declare more than there is.
What a real site answers is signed (Ed25519) over the very JSON text, which names the run, the round, the site, the
base model, n and the hash of the arrays: nothing of it can be swapped, replayed or answered for another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from client.encoding import Compression, decode, encode
from client.personalisation import Personalisation
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig
from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import Strict, compact_json
from medsegdiff.weights import ModelCard

CONTRACT_VERSION = 2
RAW = "medsegfed.raw"  # array bytes: C order, little endian, nothing else
ENCODED = "medsegfed."  # and the kind of compression: array bytes as client/encoding.py makes them
AS_IT_IS = Compression()
PACKED = "packed"  # the one array of a record
MOST_SITES = 10_000  # of a run whose sites keep state: each question names an update of each
LARGEST = 1e9  # of a loss, a distance or a time: sums over sites and rounds of what is accepted stay finite

SIGNATURE = "signature"  # the record beside a signed message
# Error.code of a site that will not or cannot answer; its reason is one of REFUSALS, the rest stays there.
REFUSED = 100

# All that a refusal may say. The details, and any name of a file or a patient, stay in the site's own log.
REFUSALS = {
    "fault": "the site could not answer; its own log says why",
    "not-approved": "the run is not approved at the site",
    "application-changed": "the program installed at the site is not the approved one",
    "too-many-rounds": "the run has more rounds than the site allows",
    "too-often": "the site has answered the same too often within an hour",
    "too-few-patients": "the site has fewer patients than its policy asks for",
    "outside-hours": "the site takes part at other hours",
    "privacy-floor": "the site asks for more privacy than the run gives",
    "round-out-of-range": "the round is not one of the approved run",
    "base-changed": "the site has trained this round from another model",
    "model-missing": "the site does not have the model that is named, and none was sent",
    "incompatible": "the site runs a version with another contract",
    "privacy-missing": "the run asks for patient-level privacy, and the site has none set up",
    "budget-spent": "the site's privacy budget does not cover what was asked",
    "ledger-rolled-back": "the site's privacy ledger is not the one that the server remembers",
}

Signer = Callable[[bytes], bytes]  # message -> Ed25519 signature

T = TypeVar("T")


class ContractError(UserError):
    """A message that does not keep the contract."""


class IncompatibleVersion(ContractError):
    """A message of another contract version."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class PrivacyRequest(Strict):
    """What a run asks of the sites' privacy policies; None leaves the site's own value, and none may be loosened."""

    epsilon: float | None = None
    delta: float | None = None
    sigma: float | None = None
    q: float | None = None
    clip: float | None = None
    batch: int | None = None
    steps: int | None = None
    rounds: int | None = None
    slices: int | None = None
    draws: int | None = None
    unit: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class PrivacyTask(Strict):
    """How a run trains at sites that protect their patients by differential privacy."""

    required: bool = True  # whether a site without a privacy section in its site.yaml must stay out
    # low_rank: corrections of the attention's kernels, norms and biases, 30,000 numbers at most; all: every weight
    train: Literal["low_rank", "all"] = "low_rank"
    asks: PrivacyRequest = PrivacyRequest()


@dataclass(frozen=True)
class TrainTask(Strict):
    """All that a site may be asked: fixed for a whole run, and what its data officer approves."""

    dataset: DatasetConfig  # channels, labels and targets that a site's data must have
    model: ModelConfig
    rounds: int
    local_steps: int  # optimizer steps a round
    seed: int
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    proximal_mu: float = 0.0  # FedProx (Li et al. 2020); 0 is FedAvg
    control_variates: bool = False  # SCAFFOLD (Karimireddy et al. 2020): mean gradients leave beside the changes
    threads: int = 2  # torch threads: the same count gives the same bits
    privacy: PrivacyTask | None = None  # None: no site trains with differential privacy
    compression: Compression = AS_IT_IS  # of the weight changes that leave a site
    personalisation: Personalisation = Personalisation()  # which weights, or which second model, stay at a site
    contract_version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        _require(self.contract_version == CONTRACT_VERSION, _version_message(self.contract_version))
        for name, low, high in (("rounds", 1, 100_000), ("local_steps", 1, 1_000_000), ("threads", 1, 1024)):
            _require(
                low <= getattr(self, name) <= high, f"{name} must lie in {low}..{high}, found {getattr(self, name)}"
            )
        _require(0 <= self.seed < 2**63, f"seed must lie in 0..2**63 - 1, found {self.seed}")
        _require(0 <= self.proximal_mu < 1000, f"proximal_mu must lie in [0, 1000), found {self.proximal_mu}")
        _require(
            self.privacy is None or not self.compression.feeds_back,
            f"compression {self.compression.kind} feeds back what it leaves out of earlier rounds; with privacy an "
            "update holds its own round's change alone. Use bf16 or none",
        )

        _require(
            self.privacy is None or not self.control_variates,
            "control variates are mean gradients, and no noise protects the patients in them; with privacy none leaves",
        )

    @property
    def keeps_state(self) -> bool:
        """Whether sites keep something from round to round, and so have to know which of their updates counted."""
        return self.compression.feeds_back or self.personalisation.keeps_state or self.control_variates

    @property
    def card(self) -> ModelCard:
        """What a model file trained by this task states about itself."""
        return ModelCard(self.model, self.diffusion, self.sampling, self.dataset)


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _version_message(found: int) -> str:
    return (
        f"contract version {found} meets {CONTRACT_VERSION} here: server and sites must run versions of medsegfed with "
        "the same contract. Update the older side; nothing was trained"
    )


@dataclass(frozen=True)
class Invitation(Strict):
    """Who asks "who is there?", for which run."""

    run: str
    nonce: str  # fresh for every question: an old answer does not fit
    ledger_anchor: str = ""  # what the site said last of its privacy ledger; it shows a ledger that was put back

    def __post_init__(self) -> None:
        texts = (self.run, self.nonce, self.ledger_anchor)
        _require(max(len(text) for text in texts) <= 128, "a text is longer than 128 signs")


@dataclass(frozen=True)
class Assignment(Strict):
    """Which round of which run, starting from (or scoring) which model."""

    run: str
    round: int  # 1, 2, ...
    model_hash: str  # hex SHA-256 of the weights: sent along, unless the site has scored this very model
    counted: tuple[str, ...] = ()  # delta_hash of every site's last update that counted; where sites keep state
    control_hash: str = ""  # hex SHA-256 of SCAFFOLD's control variate, which is sent along; empty: zero, or none

    def __post_init__(self) -> None:
        _require(len(self.run) <= 128, "a text is longer than 128 signs")
        _require(0 <= self.round <= 100_000, f"round must lie in 0..100000, found {self.round}")
        _require(_is_hash(self.model_hash), "model_hash must be 64 hexadecimal digits")
        _require(not self.control_hash or _is_hash(self.control_hash), "control_hash must be 64 hexadecimal digits")
        _require(len(self.counted) <= MOST_SITES, f"counted names more than {MOST_SITES} updates")
        _require(all(map(_is_hash, self.counted)), "counted must name updates by 64 hexadecimal digits each")


@dataclass(frozen=True)
class Presence(Strict):
    """A site's answer to "who is there?".

    With privacy on, no figure depends on a patient: `train_patients` is the site's planned public weight, the other
    counts are zero.
    """

    site: str
    run: str
    nonce: str  # the invitation's
    train_patients: int
    test_patients: int
    faults: int  # cases of the site's data that cannot be used
    software: dict[str, str] = field(default_factory=dict)  # versions of medsegfed, torch, flwr, python
    application: str = ""  # hash of the program that runs at the site; empty at virtual sites
    # Head of the site's audit log: kept here, it shows a log that was rolled back there. Empty with privacy on: the
    # hash of a line could be guessed, and with it the moment when a training ended.
    audit_head: str = ""
    private: bool = False  # whether the site trains with patient-level differential privacy
    ledger_anchor: str = ""  # keyed hash of the head of the site's privacy ledger; only the site can tell what it means
    contract_version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        _require(self.contract_version == CONTRACT_VERSION, _version_message(self.contract_version))
        _require(len(self.software) <= 8, "software names at most 8 programs")
        texts = [self.site, self.run, self.nonce, self.application, self.audit_head, self.ledger_anchor]
        texts += [*self.software, *self.software.values()]
        _require(all(len(text) <= 128 for text in texts), "a text is longer than 128 signs")
        counts = (self.train_patients, self.test_patients, self.faults)
        _require(all(0 <= n <= LARGEST for n in counts), "counts must lie in 0..1e9")


@dataclass(frozen=True)
class Update(Strict):
    """All that leaves a hospital after training in a round. A new field is a privacy decision.

    delta (kept beside the fields below on the wire): trained minus received weights; with error feedback, plus what an
    earlier compression left out; compressed as the task says.

    With privacy on, loss and seconds are None, `patients` is the site's planned public weight and delta is noised:
    beside delta and its hash, nothing depends on a patient.
    """

    site: str
    run: str
    round: int
    base_hash: str  # the model the delta starts from
    patients: int  # n: training patients, the weight of the site
    steps: int
    loss: float | None  # mean diffusion loss over the steps
    seconds: float | None
    delta_hash: str  # hex SHA-256 of the arrays, float32, as the server reads them: what is signed
    epsilon: float | None = None  # spent by the site's patients in all, this round included; None: no privacy
    privacy_delta: float | None = None  # at which epsilon is stated
    ledger_anchor: str = ""  # as in Presence, after this round

    def __post_init__(self) -> None:
        for name in ("loss", "seconds", "epsilon"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= LARGEST, f"{name} must lie in 0..1e9, found {value}")
        _require(len(self.ledger_anchor) <= 128, "a text is longer than 128 signs")
        private, open_ = (self.epsilon, self.privacy_delta), (self.loss, self.seconds)
        _require(
            (None not in open_ and set(private) == {None}) or (None not in private and set(open_) == {None}),
            "an update tells either loss and seconds or, with privacy, epsilon and its delta",
        )
        _require(self.privacy_delta is None or 0 < self.privacy_delta < 1, "privacy_delta must lie in (0, 1)")


@dataclass(frozen=True)
class Scores(Strict):
    """All that leaves a hospital after scoring a model on its held-out patients: averages over them.

    A site with a single held-out patient thereby sends that patient's Dice: hold out more, or none.
    """

    site: str
    run: str
    round: int
    model_hash: str
    patients: int  # held-out patients scored
    dice: float | None  # mean over patients and targets; None without held-out patients
    dice_by_target: dict[str, float] = field(default_factory=dict)
    hd95_mm: float | None = None  # mean over patients and targets where defined
    hd95_undefined: int = 0  # (patient, target) pairs with exactly one empty mask
    seconds: float = 0.0
    personal_dice: float | None = None  # the same of the site's own second model (ditto, fine_tune), which stays there
    personal_hd95_mm: float | None = None

    def __post_init__(self) -> None:
        numbers = [self.dice, self.hd95_mm, self.seconds, self.personal_dice, self.personal_hd95_mm]
        numbers += self.dice_by_target.values()
        _require(all(0 <= x <= LARGEST for x in numbers if x is not None), "scores must lie in 0..1e9")
        _require(self.patients >= 0 and self.hd95_undefined >= 0, "counts must not be negative")
        _require(max(self.patients, self.hd95_undefined) <= LARGEST, "counts must lie in 0..1e9")
        _require(
            all(x <= 1 for x in [self.dice, self.personal_dice, *self.dice_by_target.values()] if x is not None),
            "Dice is at most 1",
        )


def to_wire(message: object) -> ConfigRecord:
    """A contract type as a Flower record."""
    return ConfigRecord({"json": compact_json(message)})


def from_wire(content: RecordDict, name: str, kind: type[T]) -> T:
    """Read the contract type `kind` from the record `name`: exact keys, exact types.

    Raises:
        ContractError: names the record and the first fault.
    """
    from pydantic import TypeAdapter, ValidationError

    text = _text(content, name)
    _check_version(text)
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ContractError(f"{name}{'.' if where else ''}{where}: {fault['msg']}") from None


def _text(content: RecordDict, name: str) -> str:
    record = content.config_records.get(name)
    text = record.get("json") if record is not None else None
    if record is None or set(record) != {"json"} or not isinstance(text, str):
        raise ContractError(f"the record '{name}' is missing or is not one JSON text")
    return text


def _check_version(text: str) -> None:
    """Another contract version is told as such, not as the unknown keys it brings."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return  # told by the strict reading
    version = found.get("contract_version", CONTRACT_VERSION) if isinstance(found, dict) else CONTRACT_VERSION
    if isinstance(version, int) and version != CONTRACT_VERSION:
        raise IncompatibleVersion(_version_message(version))


def sign(content: RecordDict, name: str, signer: Signer | None) -> RecordDict:
    """The content with a signature over its record `name`; virtual sites, which have no key, send none."""
    if signer is not None:
        content[SIGNATURE] = ConfigRecord({"ed25519": signer(_statement(name, _text(content, name)))})
    return content


def check_signature(content: RecordDict, name: str, public_key: str) -> None:
    """The record `name` must bear the signature of the Ed25519 key `public_key` (hex).

    Raises:
        ContractError: no signature, or one that does not fit the text and the key.
    """
    record = content.config_records.get(SIGNATURE)
    found = record.get("ed25519") if record is not None else None
    if not isinstance(found, bytes):
        raise ContractError("it is not signed")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(found, _statement(name, _text(content, name)))
    except InvalidSignature:
        raise ContractError("its signature is not the enrolled key's over this message") from None


def _statement(name: str, text: str) -> bytes:
    """What is signed: the kind of message keeps a signature from serving for another kind."""
    return f"medsegfed/{CONTRACT_VERSION}/{name}\n{text}".encode()


def arrays_to_wire(tensors: Mapping[str, Tensor], compression: Compression = AS_IT_IS) -> ArrayRecord:
    """Float32 tensors as one array: raw, in the order of their names, each in C order, end to end; or compressed.

    One, because Flower moves every array as an object with requests of its own, at each of five hops.

    Raises:
        ContractError: values that are not finite are to be compressed.
    """
    if compression.kind != "none":
        try:
            return _encoded(encode(tensors, compression), compression)
        except ValueError as error:
            raise ContractError(str(error)) from None
    flat = [tensors[name].detach().cpu().contiguous().numpy().astype("<f4", copy=False) for name in sorted(tensors)]
    return packed_record(b"".join(values.reshape(-1).data for values in flat))


def packed_record(data: bytes) -> ArrayRecord:
    """Float32 values that lie end to end, little endian, in the order of their tensors' names, as the one array."""
    return ArrayRecord({PACKED: Array("float32", (len(data) // 4,), RAW, data)})


def _encoded(data: bytes, compression: Compression) -> ArrayRecord:
    return ArrayRecord({PACKED: Array("uint8", (len(data),), ENCODED + compression.kind, data)})


def arrays_from_wire(
    record: ArrayRecord, expected: Mapping[str, tuple[int, ...]], compression: Compression = AS_IT_IS
) -> dict[str, Tensor]:
    """One array as the float32 tensors it holds, checked before anything is allocated.

    Tensors share the array's memory where that may be written (as server/grid.py joins an answer), or have their own.

    Args:
        expected: the exact names and shapes.

    Raises:
        ContractError: other arrays than the one, another type, shape or number of bytes than these tensors take, or a
            value that is not finite; of compressed ones, bytes that do not decode to exactly these tensors.
    """
    if list(record) != [PACKED]:
        found = sorted(record)
        raise ContractError(f"it holds {len(found)} arrays ({[n[:40] for n in found[:3]]}), not one '{PACKED}'")
    array = record[PACKED]
    stype, dtype = (RAW, "float32") if compression.kind == "none" else (ENCODED + compression.kind, "uint8")
    if array.stype != stype or array.dtype != dtype:
        raise ContractError(f"its array is {array.dtype[:20]}/{array.stype[:20]}, not {dtype}/{stype}")
    if compression.kind != "none":
        if tuple(array.shape) != (len(array.data),):
            raise ContractError(f"its array has shape {tuple(array.shape)[:8]}, not {(len(array.data),)}")
        try:
            return decode(array.data, compression, expected)
        except ValueError as error:
            raise ContractError(str(error)) from None
    sizes = {name: math.prod(shape) for name, shape in expected.items()}
    values = sum(sizes.values())
    if tuple(array.shape) != (values,):
        raise ContractError(f"its array has shape {tuple(array.shape)[:8]}, not {(values,)}")
    if len(array.data) != 4 * values:
        raise ContractError(f"its array has {len(array.data)} bytes, {4 * values} are due")
    flat = np.frombuffer(array.data, dtype="<f4") if values else np.empty(0, "<f4")
    tensors, begin = {}, 0
    for name in sorted(expected):
        part = flat[begin : begin + sizes[name]]
        begin += sizes[name]
        if not np.isfinite(part).all():
            raise ContractError(f"array '{name}' holds {int((~np.isfinite(part)).sum())} values that are not finite")
        tensors[name] = torch.from_numpy(part.astype(np.float32, copy=not part.flags.writeable).reshape(expected[name]))
    return {name: tensors[name] for name in expected}


def array_bytes(record: ArrayRecord) -> int:
    """Payload of a record in bytes."""
    return sum(len(array.data) for array in record.values())
