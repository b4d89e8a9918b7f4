"""The `medsegfed` command.

Every verb imports what it needs when it runs: `--help` and a wrong option must answer at once, torch takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medsegdiff.errors import EXIT_CODE, UserError

# Flower reports usage to its vendor and looks for updates unless told otherwise; a hospital's machine must not.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

app = typer.Typer(
    name="medsegfed", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Hospitals train one medical image segmenter together; no image leaves its hospital.",
    epilog="First steps: medsegfed simulate quickstart",
)  # fmt: skip
model_app = typer.Typer(no_args_is_help=True, help="What a model is made of.")
data_app = typer.Typer(no_args_is_help=True, help="What a dataset holds; virtual sites from it.")
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")

DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the dataset that the recipe names.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--dataset-config", help="dataset.yaml for a folder that has none of its own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]


@app.command()
def simulate(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that is shipped (quickstart).")],
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")] = None,
    engine: Annotated[str, typer.Option(help="inline (this process) or ray (Flower's simulation engine).")] = "inline",
    resume: Annotated[bool, typer.Option(help="Go on with the run that the folder holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Virtual hospitals on one machine: federated, local-only and pooled training, and a report.

    Example: medsegfed simulate simulations/recipes/hippocampus.yaml --data DIR --out runs/hippocampus
    """
    if engine not in ("inline", "ray"):
        raise UserError(f"--engine {engine}: choose inline or ray.")
    from rich.console import Console

    from server.report import summary_table
    from simulations.simulate import simulate as run

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
    batch: Annotated[int, typer.Option(min=1, help="Slices a step.")] = 16,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate (AdamW).")] = 2e-3,
    ema: Annotated[
        float, typer.Option(min=0, max=0.99999, help="Decay of the weight average; 0 switches it off.")
    ] = 0.999,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option(help="Go on with the training that the folder holds.")] = False,
) -> None:
    """Train a MedSegDiff on one folder, with no federation anywhere.

    Example: medsegfed train DIR -o runs/alone --preset tiny --size 48 --steps 800
    """
    from medsegdiff.alone import TrainAlone, train_alone
    from medsegdiff.config import TrainingConfig
    from medsegdiff.config import preset as make_model
    from medsegdiff.data.dataset import open_dataset
    from medsegdiff.labels import LabelScheme
    from simulations.simulate import cache_folder

    dataset = open_dataset(folder, dataset_config)
    changes: dict[str, Any] = {} if size is None else {"image_size": size}
    channels = {
        "image_channels": len(dataset.config.channels),
        "mask_channels": LabelScheme.of(dataset.config).channels,
    }
    try:
        training = TrainingConfig(batch_size=batch, learning_rate=learning_rate)
        wanted = TrainAlone(
            make_model(preset, **channels, **changes), steps, training, ema_decay=ema, seed=seed, threads=threads
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    with _progress("train"):
        model = train_alone(dataset, wanted, out, cache_folder(), device, resume)
    typer.echo(f"Model: {model}\nNext: medsegfed evaluate {model} {folder} --split test")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Dataset with masks; without a dataset.yaml the model's own is used.")],
    dataset_config: ConfigOption = None,
    split: Annotated[str, typer.Option(help="all (those trained on too), or one split: train, val, test.")] = "all",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's.")] = None,
    members: Annotated[int | None, typer.Option(min=1, help="Samples an image; default: the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score a model: Dice and HD95 per patient, slices restacked.

    Example: medsegfed evaluate runs/alone/model.safetensors DIR --split test
    """
    from deploy.scoring import evaluate_folder, scores_table

    with _progress("evaluate"):
        result = evaluate_folder(model, folder, dataset_config, split, _sampling(steps, members), seed, threads, device)
    if as_json:
        _print_json(result)
        return
    from rich.console import Console

    Console().print(scores_table(result))


@app.command()
def segment(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    scans: Annotated[list[str], typer.Argument(help="NIfTI, PNG, TIFF, JPEG ...; files of one scan joined by ';'.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the masks.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's.")] = None,
    members: Annotated[int, typer.Option(min=1, help="Samples an image; their spread is the uncertainty.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 2,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """From a scan to a mask on the scan's own grid, with an uncertainty map (percent of one bit).

    Example: medsegfed segment model.safetensors scan.nii.gz -o masks
    """
    from deploy.scoring import segment_scans

    with _progress("segment"):
        results, faults = segment_scans(model, scans, out, _sampling(steps, members), seed, threads, device)
    if as_json:
        _print_json({"segmented": results, "failed": faults})
    else:
        for result in results:
            volumes = ", ".join(f"{name} {ml} ml" for name, ml in result["volumes_ml"].items() if ml is not None)
            written = [*result["masks"], *([result["uncertainty"]] if result["uncertainty"] else [])]
            typer.echo(f"{result['scan']} -> {', '.join(written)}" + (f" ({volumes})" if volumes else ""))
        for fault in faults:
            typer.echo(f"not segmented: {fault['reason']}", err=True)
    if faults:
        raise typer.Exit(EXIT_CODE)


@model_app.command("show")
def model_show(
    preset: Annotated[str, typer.Argument(help="tiny, S, B or L.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side; default: the preset's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Slices a training step.")] = 1,
    channels: Annotated[int, typer.Option(min=1, help="Image channels.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Mask channels.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Parameters, GFLOP of a forward pass, and memory of a preset.

    Example: medsegfed model show S --size 128 --batch 8
    """
    from deploy.model_card import describe_preset, description_lines

    figures = describe_preset(preset, size, batch, channels, classes)
    if as_json:
        _print_json(figures)
    else:
        typer.echo("\n".join(description_lines(figures)))


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="Dataset folder.")],
    dataset_config: ConfigOption = None,
    size: Annotated[int, typer.Option(min=8, help="Pixels a side that the cases are prepared at.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """What a dataset holds: patients, sites, labels, spacing, and every case that cannot be used.

    Example: medsegfed data check DIR --dataset-config simulations/datasets/lgg_tcga.yaml
    """
    from deploy.scoring import check_folder, check_lines

    with _progress("prepare"):
        found = check_folder(folder, dataset_config, size)
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(check_lines(found)))


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
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        typer.echo("interrupted; go on with --resume", err=True)
        sys.exit(130)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))


def _sampling(steps: int | None, members: int | None) -> dict[str, int]:
    return {name: value for name, value in (("steps", steps), ("members", members)) if value is not None}


def _progress(stage: str) -> Any:
    from simulations.display import single_bar

    return single_bar(stage)


if __name__ == "__main__":
    main()
