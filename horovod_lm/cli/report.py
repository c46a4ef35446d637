"""`horovod-lm report`."""

from pathlib import Path

import click

from horovod_lm.cli.common import json_option

EPILOG = """\b
Examples:
  horovod-lm report runs/mine
  horovod-lm report runs/* --output overview.html
  horovod-lm report runs/compared                 the page of a comparison, made anew
  horovod-lm report runs/compared runs/mine --json"""


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    default=Path("report.html"),
    show_default=True,
    help="The page; one that is there is replaced.",
)
@json_option
def command(runs: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Make one page of any past runs, laid over each other.

    RUN is the folder of a run, finished or not, or of a comparison. Curves are compared where runs
    are meant to train the same, and the keys in which they differ are listed. Speeds are shown,
    but not compared, since the runs did not take turns (those of a single comparison did, and
    are).
    """
    import json

    from horovod_lm.errors import UserError
    from horovod_lm.report.page import write_page
    from horovod_lm.report.past import open_runs
    from horovod_lm.report.terminal import make_console, print_results

    comparison = open_runs(runs)
    console = make_console(stderr=as_json)
    try:
        write_page(comparison, output)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--output {output} can't be written: {reason}") from None
    if as_json:
        click.echo(json.dumps(comparison.as_json(), indent=1, ensure_ascii=False))
    else:
        print_results(comparison, console)
    console.print(f"report: {output}", markup=False)
