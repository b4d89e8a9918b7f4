"""The `medsegfed` command.

Every verb imports what it needs when it runs: `--help` and a wrong option must answer at once, torch takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from deploy import cli_federation, cli_privacy
from medsegdiff.errors import EXIT_CODE, UserError

if TYPE_CHECKING:
    from medsegdiff.data.prepare import CaseFault

# Flower reports usage to its vendor and looks for updates unless told otherwise; a hospital's machine must not.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

INTERRUPTED = 130  # exit code: 128 + SIGINT

app = typer.Typer(
    name="medsegfed", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Hospitals train one medical image segmenter together; no image leaves its hospital.",
    epilog="First steps: medsegfed simulate quickstart",
)  # fmt: skip
model_app = typer.Typer(no_args_is_help=True, help="What a model is made of.")
data_app = typer.Typer(no_args_is_help=True, help="What a dataset holds; published datasets; virtual sites.")
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")
app.add_typer(cli_federation.app)
app.add_typer(cli_privacy.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        names = ("medsegfed", "flwr", "torch", "opacus")
        typer.echo(" · ".join(f"{name} {version(name)}" for name in names))
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Versions, and nothing else.")
    ] = False,
) -> None:
    """What may stand before the verb."""


DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the dataset that the recipe names.")]


def _shipped_config(given: Path | None) -> Path | None:
    """A bare name that is no file means the description of that name that is shipped."""
    if given is None or given.exists() or given.parent != Path():
        return given
    import simulations

    shipped = Path(simulations.__file__).parent / "datasets" / f"{given.name}.yaml"
    return shipped if shipped.is_file() else given


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--dataset-config", callback=_shipped_config,
        help="dataset.yaml for a folder that has none of its own; or the name of a shipped one (msd_hippocampus).",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
FuseOption = Annotated[
    str | None, typer.Option(help="How members make one mask: mean, majority or staple; default: the model's.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, a GPU's index (1) or part of its name (H200).")]


@app.command()
def simulate(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that is shipped (quickstart).")],
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")] = None,
    engine: Annotated[str, typer.Option(help="inline (this process) or ray (Flower's simulation engine).")] = "inline",
    resume: Annotated[bool, typer.Option(help="Go on with the run that the folder holds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Of a recipe with several budgets: runs at a time.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Virtual hospitals on one machine: federated, local-only and pooled training, and a report.

    Example: medsegfed simulate simulations/recipes/hippocampus.yaml --data DIR --out runs/hippocampus
    """
    if engine not in ("inline", "ray"):
        raise UserError(f"--engine {engine}: choose inline or ray.")
    from rich.console import Console

    from server.report import summary_table
    from simulations.budgets import compare_budgets, wants_budgets
    from simulations.simulate import simulate as run

    if wants_budgets(recipe):
        found = compare_budgets(recipe, data, out, engine, resume, jobs)  # type: ignore[arg-type]
        if as_json:
            _print_json(found.figures)
        else:
            typer.echo(found.table)
            typer.echo(f"Plot: {found.plot}\nPage: {found.page}")
        return
    outcome = run(recipe, data, out, engine, resume)  # type: ignore[arg-type]  # checked above
    if as_json:
        _print_json(outcome.report)
        return
    console = Console()
    console.print(summary_table(outcome.report))
    console.print(f"Report: {outcome.html}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Dataset: cases.csv, nnU-Net raw or Decathlon folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model; must be new or empty.")],
    dataset_config: ConfigOption = None,
    preset: Annotated[str, typer.Option(help="Network: tiny, S, B or L.")] = "tiny",
    size: Annotated[int | None, typer.Option(help="Pixels a side; default: the preset's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch: Annotated[
        int, typer.Option(min=1, help="Slices a step; taken in parts, to the same effect, where memory is short.")
    ] = 16,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate (AdamW).")] = 2e-3,
    ema: Annotated[
        float, typer.Option(min=0, max=0.99999, help="Decay of the weight average; 0 switches it off.")
    ] = 0.999,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 on a GPU that has it.")] = "auto",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the network first (a minute or so); pays in long trainings.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the training that the folder holds.")] = False,
) -> None:
    """Train a MedSegDiff on one folder, with no federation anywhere.

    Example: medsegfed train DIR -o runs/alone --preset tiny --size 48 --steps 800
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {precision}: choose auto, fp32 or bf16.")
    from medsegdiff.alone import TrainAlone, train_alone
    from medsegdiff.config import TrainingConfig
    from medsegdiff.config import preset as make_model
    from medsegdiff.data.dataset import open_dataset
    from medsegdiff.labels import LabelScheme
    from simulations.simulate import cache_folder

    dataset = open_dataset(folder, dataset_config)

    def left_out(faults: Sequence[CaseFault]) -> None:
        for fault in faults:
            typer.echo(f"left out: case {fault.case_id}: {fault.reason} ({fault.file})", err=True)
        if faults:
            typer.echo(f"{len(faults)} of {len(dataset.cases)} cases are left out; the training goes on.", err=True)

    changes: dict[str, Any] = {} if size is None else {"image_size": size}
    channels = {
        "image_channels": len(dataset.config.channels),
        "mask_channels": LabelScheme.of(dataset.config).channels,
    }
    try:
        training = TrainingConfig(
            batch_size=batch,
            learning_rate=learning_rate,
            precision=precision,  # type: ignore[arg-type]  # checked above
        )
        wanted = TrainAlone(
            make_model(preset, **channels, **changes), steps, training, ema_decay=ema, seed=seed, threads=threads
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    with _progress("train"):
        model = train_alone(dataset, wanted, out, cache_folder(), device, resume, compile_, left_out)
    typer.echo(f"Model: {model}\nNext: medsegfed evaluate {model} {folder} --split test")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Dataset with masks; without a dataset.yaml the model's own is used.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for scores.json, scores.csv and pictures.")
    ] = None,
    dataset_config: ConfigOption = None,
    split: Annotated[str, typer.Option(help="all (those trained on too), or one split: train, val, test.")] = "all",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's.")] = None,
    members: Annotated[int | None, typer.Option(min=1, help="Samples an image; default: the model's.")] = None,
    fuse: FuseOption = None,
    surface_tolerance: Annotated[
        float, typer.Option(min=0, max=1000, help="mm within which surfaces agree, for the surface Dice.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score a model per patient, slices restacked: overlap, surfaces, volumes, calibration (docs/metrics.md).

    With several --members also the range of volumes; where several raters drew, the distance of the two sets of masks.

    Example: medsegfed evaluate runs/alone/model.safetensors DIR --split test --members 5 -o scores
    """
    from deploy.scoring import evaluate_folder, scores_table, volumes_table

    changes = _sampling(steps, members, fuse)
    with _progress("evaluate"):
        result = evaluate_folder(
            model, folder, dataset_config, split, changes, seed, threads, device, surface_tolerance, out
        )
    if as_json:
        _print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(scores_table(result))
    if (volumes := volumes_table(result)) is not None:
        console.print(volumes)
    if out is not None:
        typer.echo(f"Scores and pictures: {out}")


@app.command()
def segment(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    scans: Annotated[
        list[str],
        typer.Argument(
            help="NIfTI, DICOM series, PNG, TIFF ...; files of one scan joined by ';'; or a folder of scans."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; nothing in it is overwritten.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's.")] = None,
    members: Annotated[int, typer.Option(min=1, help="Samples an image; their spread is the uncertainty.")] = 5,
    fuse: FuseOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same scan, same masks.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option(help="Skip the scans that this command has finished before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """From scans to masks on their own grid, with uncertainty maps, a preview and the range of volumes.

    NAME_mask, and for DICOM NAME_seg.dcm. NAME_uncertainty: entropy of the members' votes, percent of one bit;
    NAME_variance: of their values, percent of the largest there can be. NAME.json: volume of the mask, and of the
    smallest and the largest member. segment.json: what became of every scan (docs/segmenting.md).

    Example: medsegfed segment model.safetensors scan.nii.gz -o masks
    """
    from deploy.segmenting import segment_scans

    changes = _sampling(steps, members, fuse)
    with _progress("segment"):
        job = segment_scans(model, scans, out, changes, seed, threads, device, resume)
    if as_json:
        _print_json(job.plain())
    else:
        for line in job.lines():
            typer.echo(line)
        if job.skipped:
            typer.echo(f"{len(job.skipped)} of {job.scans} were done before.")
        for fault in job.failed:
            typer.echo(f"not segmented: {fault['reason']}", err=True)
        if job.scans > 1:
            typer.echo(f"Summary: {out / 'segment.json'}")
    if job.failed:
        raise typer.Exit(EXIT_CODE)


@model_app.command("show")
def model_show(
    preset: Annotated[str, typer.Argument(help="tiny, S, B or L.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side; default: the preset's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Slices at once.")] = 1,
    channels: Annotated[int, typer.Option(min=1, help="Image channels.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Mask channels.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Parameters, GFLOP, and the memory that a GPU needs for a preset, in fp32 and in bf16.

    Example: medsegfed model show B --size 256 --batch 8
    """
    from deploy.model_card import describe_preset, description_lines

    figures = describe_preset(preset, size, batch, channels, classes)
    if as_json:
        _print_json(figures)
    else:
        typer.echo("\n".join(description_lines(figures)))


@model_app.command("export")
def model_export(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    to: Annotated[str, typer.Option(help="onnx or monai-bundle.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must be new or empty.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="ONNX: pixels a side of the images; default: the model's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """A model for other programs: ONNX graphs checked against torch, or a bundle that MONAI runs (docs/export.md).

    Example: medsegfed model export model.safetensors --to onnx -o exported
    """
    if to not in ("onnx", "monai-bundle"):
        raise UserError(f"--to {to}: choose onnx or monai-bundle.")
    if to == "onnx":
        from deploy.export import export_onnx

        written = export_onnx(model, out, size)
    elif size is None:
        from deploy.bundle import export_bundle

        written = export_bundle(model, out)
    else:
        raise UserError("--size is for --to onnx; a bundle holds the model itself. Leave it out.")
    if as_json:
        _print_json(vars(written))
        return
    typer.echo("\n".join(f"{out / name}" for name in written.files))
    if written.relative_error is None:
        typer.echo(f"Next: see {out / 'docs' / 'README.md'}")
    else:
        typer.echo(f"Largest relative difference from torch: {written.relative_error:.1e}\nNext: see docs/export.md")


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="Dataset folder.")],
    dataset_config: ConfigOption = None,
    size: Annotated[int, typer.Option(min=8, help="Pixels a side that the cases are prepared at.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """What a dataset holds: patients, sites, labels, spacing, and every case that cannot be used.

    Example: medsegfed data check DIR --dataset-config lgg_tcga
    """
    from deploy.scoring import check_folder, check_lines

    with _progress("prepare"):
        found = check_folder(folder, dataset_config, size)
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(check_lines(found)))


def _list_published(wanted: bool) -> None:
    if wanted:
        from simulations.published.catalogue import catalogue_lines

        typer.echo("\n".join(catalogue_lines()))
        raise typer.Exit


@data_app.command("import")
def data_import(
    name: Annotated[str, typer.Argument(help="Which dataset; --list names them.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Where it lies, as its authors distribute it.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new or empty.")],
    _: Annotated[
        bool,
        typer.Option("--list", is_eager=True, callback=_list_published, help="Names, and where each is to be had."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """A published dataset brought to the form that is read here: cases.csv, dataset.yaml, images/, masks/.

    Example: medsegfed data import isic2018 downloads/isic data/isic2018
    """
    from simulations.published.catalogue import published
    from simulations.published.layout import import_published, summary_lines

    dataset = published(name)
    with _progress("import"):
        summary = import_published(dataset, source, target)
    if as_json:
        _print_json({**vars(summary), "folder": str(target)})
        return
    typer.echo("\n".join(summary_lines(summary)))
    typer.echo(f"Next: medsegfed data check {target}, then medsegfed simulate {name} --data {target}")


@data_app.command("split")
def data_split(
    recipe: Annotated[Path, typer.Argument(help="A recipe: its world section says how patients are dealt out.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the sites; must not exist.")],
    data: DataOption = None,
) -> None:
    """Write a recipe's virtual hospitals to disk, each a folder as a real site has it.

    Example: medsegfed data split simulations/recipes/lgg-sites.yaml --data DIR -o worlds/lgg
    """
    from simulations.display import make_console
    from simulations.recipe import read_recipe
    from simulations.simulate import write_sites

    sites = write_sites(read_recipe(recipe), data, out, make_console())
    for path in sites:
        typer.echo(str(path))


def main() -> None:
    """Entry point: a fault of the user is one line and exit code 2, never a traceback."""
    try:
        code = app(prog_name="medsegfed", standalone_mode=False)
        if code == INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "medsegfed"
        typer.echo(f"error: {error.format_message().removesuffix('.')}. Look at: {command} --help", err=True)
        sys.exit(EXIT_CODE)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_CODE)
    except (KeyboardInterrupt, click.Abort):
        typer.echo("interrupted; nothing half-written is left. A command that has --resume goes on with it.", err=True)
        sys.exit(INTERRUPTED)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))


def _sampling(steps: int | None, members: int | None, fuse: str | None) -> dict[str, Any]:
    if fuse not in (None, "mean", "majority", "staple"):
        raise UserError(f"--fuse {fuse}: choose mean, majority or staple.")
    chosen = {"steps": steps, "members": members, "fuse": fuse}
    return {name: value for name, value in chosen.items() if value is not None}


def _progress(stage: str) -> Any:
    from simulations.display import single_bar

    return single_bar(stage)


if __name__ == "__main__":
    main()
