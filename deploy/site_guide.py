"""Pages that a site's people read: the guide that the coordinator hands out, and a new site.yaml."""

from __future__ import annotations

import json


def site_guide(federation: str, server: str, ca_fingerprint: str, contact: str) -> str:
    """One page, Markdown.

    Args:
        server: host:port.
        ca_fingerprint: in groups of four.
        contact: whom to phone; empty: a line to be filled in.
    """
    host, _, port = server.rpartition(":")
    phone = contact or "(coordinator: write your name and a phone number here that the sites know from elsewhere)"
    return f"""\
# Taking part in {federation}

For the hospital's IT and its data officer. One page; nothing else need be read to begin.

## What never leaves the hospital

Images, masks, names, dates and every other figure of a patient. The private keys made by `medsegfed join`: the
coordinator never asks for them, and nobody should be sent the folder `keys/`.
What does leave: weights of the model, counts of patients, average scores (`client/contract.py` lists every field).

## Join

1. `medsegfed join YOUR-SITE --patients N`
   N: patients you train with; it is the largest weight that your updates may claim. This makes keys in `keys/`
   (readable by you alone), `site.yaml` if there is none, and `YOUR-SITE.request`. It shows a fingerprint.
2. Send `YOUR-SITE.request` to the coordinator, by mail or as you like: it holds no secret.
3. Phone the coordinator and read out the fingerprint. Call a number that you know, not one from a mail:

   {phone}

4. The coordinator sends back `YOUR-SITE.kit`: `medsegfed join --kit YOUR-SITE.kit`
   It shows the fingerprint of the federation's authority. Have the coordinator read out theirs: it must be the same.
   (This page names it too, but pages can be changed on their way. With `--ca "FINGERPRINT"` the kit is refused unless
   it has the one that was read out.)

   `{ca_fingerprint}`

5. Look through `site.yaml`: the data folder, and the policy that says which runs you take part in.
6. `medsegfed doctor` tells what is still missing. Then `medsegfed site start`.

## Network

- **Firewall**: outgoing TCP to `{host}`, port `{port}`. That is all. Nothing comes in: no port is opened at your side.
- **Proxy**: set `HTTPS_PROXY=http://proxy:3128` for the service; the connection goes through by CONNECT.
- **Interception**: a firewall or antivirus that opens TLS ("SSL inspection") breaks mutual TLS. Have `{host}` exempted;
  `medsegfed doctor` names who intercepts.
- **Clock**: keep it by NTP. More than a few seconds ahead, or 5 minutes behind, and the server turns the site away.

## Later

- Certificates last at most 90 days and are renewed over the network while the site runs; `medsegfed renew` does so at
  once. Warnings come 30, 7 and 1 days before one ends. An expired one needs `medsegfed join` and a new kit; the keys
  stay.
- An update of the software needs no new kit.
- Keys lost, or perhaps copied? Phone the coordinator at once: `medsegfed revoke` shuts the site out within a round.
  Then move `keys/` away and join anew.
"""


def new_site_yaml(name: str, data: str = "data") -> str:
    """A site.yaml to begin with, each line explained."""
    return f"""\
# This site, for its IT and its data officer. Nothing in here is sent to anybody but the name.

name: {json.dumps(name)}      # as the coordinator admits it
data: {json.dumps(data)}      # dataset folder, relative to this file (docs/bring-your-own-dataset.md)
device: auto      # auto, cpu, cuda, a GPU's index (1) or part of its name ("H200")
keys: keys        # folder of the site's keys, relative to this file; it never leaves this machine

# What the site lets run. A run that does not keep to all of it is refused and noted in the audit log.
policy:
  application: null        # hash of the one program that may run (medsegfed doctor shows it); null: approved with a run
  max_rounds: 200          # a run with more rounds is refused
  min_patients: 5          # with fewer training patients the site takes no part: updates would say too much of each
  allowed_hours: null      # "18:00-07:00": train at night only, by this machine's clock; null: at any time
  approval_required: true  # each run waits until medsegfed approve RUN; keep this unless you trust every run

# Patient-level differential privacy (docs/privacy.md). null: none. With a section, nothing is trained here without it,
# and no run may loosen it. medsegfed privacy plan works out sigma, q and steps for your number of patients; here: 200
# to train on, and a run that begins with a model of public patients. These numbers are public.
#
# privacy:
#   weight: 200              # what the site counts for: planned, not the number of patients
#   held_out: withheld       # withheld: no score leaves; public: the held-out patients are declared public
#   answer_every: 60.0       # seconds: an answer leaves at a multiple, for its time tells how many patients were drawn
#   mechanism:
#     {{epsilon: 8.0, delta: 1.0e-5, sigma: 2.5, q: 0.1, clip: 0.02, batch: 20, steps: 10, rounds: 20, slices: 4,
#      draws: 4}}
privacy: null
"""
