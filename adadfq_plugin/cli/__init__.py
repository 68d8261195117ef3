"""The ``adadfq`` command: quantize, evaluate, synthesize, methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adadfq_plugin.cli.options import Command, Network, Run, fields_as_options, option, plan
from adadfq_plugin.cli.program import EXIT_CODES, Program
from adadfq_plugin.cli.progress import Bars
from adadfq_plugin.config import AdaDFQSettings, Scheme
from adadfq_plugin.errors import SettingsError

__all__ = ["main"]

COUNT = 256
"""Images that ``synthesize`` makes, unless told otherwise."""
CallableT = TypeVar("CallableT", bound=Callable[..., Any])

_NAMES = """\b
NAME is
  any name of timm           resnet18, mobilenetv2_100.ra_in1k
  hf-hub:OWNER/MODEL         timm weights of the Hugging Face Hub
  local-dir:FOLDER           timm weights in a folder
  demo:tf_efficientnet_lite0 the network that comes with the extra [demo]
With --checkpoint FILE a timm name stands for the architecture alone."""


def _network(function: CallableT) -> CallableT:
    return fields_as_options(Network, "Network and its images", skip=("name",))(function)


def _debug(function: CallableT) -> CallableT:
    return option("--debug", is_flag=True, expose_value=False, help="show where an error came from")(function)


def _images(required: bool) -> Callable[[CallableT], CallableT]:
    def decorate(function: CallableT) -> CallableT:
        section = "Labelled images"
        where = "folder of labelled images, one sub-folder a class" + (
            "" if required else ", for the figures alone"
        )
        for decorator in (
            option(
                "-j",
                "--workers",
                type=click.IntRange(0),
                default=0,
                show_default=True,
                section=section,
                help="processes that read images",
            ),
            option(
                "--class-map",
                metavar="FILE",
                section=section,
                help="class to index, as timm takes it; unset: synsets, numbers or order of the sub-folders",
            ),
            option("--val", metavar="FOLDER", section=section, required=required, help=where),
        ):
            function = decorator(function)
        return function

    return decorate


def _config(function: CallableT) -> CallableT:
    return option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of options, as a run writes it; options given here come first",
    )(function)


@click.group(cls=Program, epilog=EXIT_CODES)
@click.version_option(package_name="adadfq_plugin", prog_name="adadfq", message="%(prog)s %(version)s")
def main() -> None:
    """Quantizes a trained network without any data."""


@main.command(cls=Command, epilog=f"{_NAMES}\n\n{EXIT_CODES}")
@click.argument("name", default="")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FOLDER",
    help="folder for the model, the synthetic set, the settings and the report",
)
@option("--force", is_flag=True, help="replace an output folder that holds something")
@_config
@_debug
@fields_as_options(Run, "Run")
@_images(required=False)
@_network
@fields_as_options(Scheme, "Bits and kernels")
@fields_as_options(AdaDFQSettings, "Settings of the method", short={"batch_size": "-b"})
def quantize(
    output: Path,
    force: bool,
    config: Path | None,
    val: str | None,
    class_map: str | None,
    workers: int,
    **values: Any,
) -> None:
    """Quantizes the network NAME and writes one folder with all that came of it."""
    planned = plan(values, config)
    from adadfq_plugin.cli import job

    if val is None and (class_map or workers):
        raise SettingsError("--class-map and --workers are of labelled images: give --val FOLDER too")
    images = None if val is None else job.Images(val, class_map, workers)
    with Bars() as bars:
        report = job.quantize(planned, output, images, force=force, bars=bars)
    click.echo(job.summary(report, output))


@main.command(cls=Command, epilog=f"{_NAMES}\n\n{EXIT_CODES}")
@click.argument("name")
@_debug
@option("-b", "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="images at a time")
@_images(required=True)
@_network
def evaluate(val: str, class_map: str | None, workers: int, batch_size: int, **values: Any) -> None:
    """Measures top-1 of the network NAME, or of the one in a folder that 'adadfq quantize' wrote."""
    planned = plan(values, None)
    from adadfq_plugin.cli import job

    with Bars() as bars:
        accuracy = job.evaluate(planned, job.Images(val, class_map, workers, batch_size), bars)
    ((network, top1),) = accuracy.top1.items()
    click.echo(
        f"{network} top-1 {100 * top1:.2f} % ({round(top1 * accuracy.count)} of {accuracy.count} images)"
    )


@main.command(cls=Command, epilog=f"{_NAMES}\n\n{EXIT_CODES}")
@click.argument("name", default="")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="*.safetensors, *.npz, or a folder of PNG files",
)
@option(
    "-n",
    "--count",
    type=click.IntRange(1),
    default=None,
    help=f"how many images; unset: the samples that --config sets, or {COUNT}",
)
@option("--force", is_flag=True, help="replace an output that exists")
@_config
@_debug
@fields_as_options(Run, "Run")
@_network
@fields_as_options(Scheme, "Bits and kernels of the network that the images are made for")
@fields_as_options(AdaDFQSettings, "Settings of the method", short={"batch_size": "-b"}, skip=("samples",))
def synthesize(output: Path, count: int | None, force: bool, config: Path | None, **values: Any) -> None:
    """Makes images from the network NAME alone, for tools that calibrate by themselves."""
    planned = plan(values, config)
    from adadfq_plugin.cli import job

    count = count or planned.settings.get("samples") or COUNT
    with Bars() as bars:
        samples = job.synthesize(planned, output, count, force=force, bars=bars)
    size = "x".join(map(str, samples.facts.input_size))
    click.echo(f"{len(samples)} images {size} by {planned.run.method}, seed {planned.run.seed}: {output}")


@main.command(cls=Command)
@_debug
def methods() -> None:
    """Lists the calibration methods that are installed, and those that are broken."""
    from adadfq_plugin import api

    registry = api.methods()
    for entry in registry.entries():
        origin = f"{entry.distribution} {entry.version}"
        if entry.status != "ok":
            click.echo(f"{entry.name}  BROKEN ({origin}, {entry.value}): {entry.status}")
            continue
        method = registry.get(entry.name)
        click.echo(f"{entry.name}  {method.summary} ({origin})")
        for name, changes in method.presets.items():
            told = ", ".join(f"{key} = {value}" for key, value in changes.items()) or "the defaults"
            click.echo(f"  --preset {name}: {told}")
