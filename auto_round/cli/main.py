"""The command line: `auto-round MODEL [flags]`, `auto-round list ...`, and one command per recipe.

Exit code 0 for success, 2 for wrong usage, 1 for any other failure.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from auto_round.cli.arguments import (
    Evaluating,
    Host,
    Later,
    Machine,
    Output,
    SchemeFlags,
    Tuning,
    normalized,
    to_options,
)
from auto_round.core.errors import AutoRoundError, FormatError, NotYetError, PlanError, SchemeError
from auto_round.options import Options
from auto_round.version import __version__

if TYPE_CHECKING:
    from auto_round.api import AutoRound

USAGE, FAILURE = 2, 1
ModelName = Annotated[
    str | None, Parameter(name=["model", "--model", "--model-name", "--model-name-or-path"])
]


def build(recipe: str) -> cyclopts.App:
    """The command of one recipe."""
    app = cyclopts.App(
        name="auto-round" if recipe == "default" else f"auto-round-{recipe.replace('_', '-')}",
        help=f"Quantize a language model (recipe: {recipe}). "
        "Example: auto-round ./model --scheme W4A16 --output_dir ./out",
        version=__version__,
        version_flags=["--version"],
        help_flags=["--help", "-h"],
        suppress_keyboard_interrupt=False,  # `execute` answers it, with a word about --resume
    )

    @app.command(name="list")
    def list_what(what: str) -> None:
        """Show what there is: format, scheme, backend or alg."""
        # Here and below: torch and transformers take seconds, which --help and a misspelt flag should not.
        from auto_round.cli.listing import show

        show(what, Console())

    @app.command
    def verify(folder: str, *, tp: str = "") -> None:
        """Report what a server would refuse or misread in the checkpoint FOLDER.

        Parameters
        ----------
        tp: degrees of tensor parallelism to check, such as 2,4,8.
        """
        from auto_round.cli.verifying import report

        report(folder, tp, Console())

    @app.command(name="plan")
    def plan(
        model: ModelName = None,
        *,
        output: Output = Output(),  # noqa: B008 - frozen
        scheme: SchemeFlags = SchemeFlags(),  # noqa: B008
        tuning: Tuning = Tuning(),  # noqa: B008
        machine: Machine = Machine(),  # noqa: B008
    ) -> None:
        """Show what would be done with MODEL: layers, sizes, memory and time. Quantizes nothing."""
        _outline(recipe, model, output, scheme, tuning, machine)

    @app.command(name="eval")
    def evaluate(
        model: ModelName = None,
        *,
        evaluating: Evaluating = Evaluating(),  # noqa: B008
        host: Host = Host(),  # noqa: B008
    ) -> None:
        """Run benchmarks of lm-eval on MODEL as it is, quantized or not. `--eval` is the same."""
        if model is None:
            raise PlanError("no model given. Example: auto-round ./my-model --eval --tasks lambada_openai")
        from auto_round.cli.evaluating import settings_of, show_scores

        show_scores(model, settings_of(evaluating, host), evaluating.eval_output)

    @app.default
    def run(
        model: ModelName = None,
        *,
        output: Output = Output(),  # noqa: B008 - frozen
        scheme: SchemeFlags = SchemeFlags(),  # noqa: B008
        tuning: Tuning = Tuning(),  # noqa: B008
        machine: Machine = Machine(),  # noqa: B008
        evaluating: Evaluating = Evaluating(),  # noqa: B008
        later: Later = Later(),  # noqa: B008
    ) -> None:
        """Quantize MODEL: a folder, a hub id or a GGUF file. With --tasks, benchmark the result."""
        later.refuse()
        if (flag := evaluating.needless()) is not None:
            raise PlanError(f"--{flag.replace('_', '-')} is about benchmarks: give --tasks too, or --eval")
        if model is None:
            raise PlanError("no model given. Example: auto-round ./my-model --scheme W4A16")
        if output.dry_run:
            _outline(recipe, model, output, scheme, tuning, machine)
        elif evaluating.tasks is None:
            _quantize(recipe, model, output, scheme, tuning, machine)
        else:
            from auto_round.cli.evaluating import settings_of, show_scores

            # What is wrong with them is said before the work.
            settings = settings_of(evaluating, machine, tuning.seed)
            folders = _quantize(recipe, model, output, scheme, tuning, machine)
            show_scores(folders[-1], settings, evaluating.eval_output)

    return app


def _outline(
    recipe: str,
    model: str | None,
    output: Output,
    scheme: SchemeFlags,
    tuning: Tuning,
    machine: Machine,
) -> None:
    if model is None:
        raise PlanError("no model given. Example: auto-round plan ./my-model --scheme W4A16")
    options = to_options(recipe, output, scheme, tuning, machine)
    from auto_round.cli.outlining import show_outline

    job = _job(model, options)
    show_outline(job.outline(output.format), Console())


def _job(model: str, options: Options) -> AutoRound:
    from auto_round.api import AutoRound

    values = {f.name: getattr(options, f.name) for f in fields(options)}
    if options.low_cpu_mem_usage is None and options.max_ram is None:
        # A command returns no model, so nothing is gained by holding more than a block of it.
        values["low_cpu_mem_usage"] = True
    return AutoRound(model, **values)


def _quantize(
    recipe: str, model: str, output: Output, scheme: SchemeFlags, tuning: Tuning, machine: Machine
) -> list[str]:
    """Quantize, save and say what was done; the folders that were written."""
    options = to_options(recipe, output, scheme, tuning, machine)
    from auto_round.cli.progress import Show

    console = Console(stderr=True)  # stdout holds the closing table and nothing else
    job = _job(model, options)
    with Show(console) as show:
        job.observers.append(show)
        _, written = job.quantize_and_save(output.output_dir, format=output.format)
    folders = [written] if isinstance(written, str) else list(written)
    Console().print(show.summary(job.material.folder, folders))
    return folders


def execute(recipe: str, argv: list[str]) -> int:
    """Run the command of `recipe` with `argv`; the exit code."""
    console = Console(stderr=True, soft_wrap=True)  # a pipe gets unbroken messages
    try:
        # cyclopts would print and leave by itself; errors of both kinds should look alike and have our exit codes.
        build(recipe)(normalized(argv), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return USAGE
    except (AutoRoundError, TypeError) as error:
        # An unknown keyword is the user's mistake; any other TypeError is ours and keeps its traceback.
        if isinstance(error, TypeError) and "AutoRound()" not in str(error):
            raise
        console.print(f"error: {error}", style="red", markup=False)
        usage = (SchemeError, PlanError, FormatError, NotYetError, TypeError)
        return USAGE if isinstance(error, usage) else FAILURE
    except KeyboardInterrupt:
        console.print("interrupted; --resume goes on from the finished blocks, if there are any", style="red")
        return FAILURE
    return 0


def main() -> None:
    """`auto-round`."""
    sys.exit(execute("default", sys.argv[1:]))


def main_eval() -> None:
    """`auto-round-eval`."""
    sys.exit(execute("default", ["eval", *sys.argv[1:]]))


def main_best() -> None:
    """`auto-round-best`."""
    sys.exit(execute("best", sys.argv[1:]))


def main_light() -> None:
    """`auto-round-light`."""
    sys.exit(execute("light", sys.argv[1:]))


def main_opt_rtn() -> None:
    """`auto-round-opt-rtn`."""
    sys.exit(execute("opt_rtn", sys.argv[1:]))


def main_rtn() -> None:
    """`auto-round-rtn`."""
    sys.exit(execute("rtn", sys.argv[1:]))
