"""The command `clt`: what is typed goes to a command, what goes wrong becomes one line and an exit code.

The commands lie in `commands/`. Nothing heavy is imported for `--help`.
"""

import resource
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from .commands.answers import BAD_USAGE, FAULTY, INTERRUPTED, OK
from .commands.caches import info, verify
from .commands.harvest import harvest_command
from .commands.plan import plan_command
from .commands.remote import pull_command, push_command
from .commands.runs import eval_command, export_command, features_command, import_command
from .commands.train import calibrate_command, train_command
from .stopping import EndedByOthers, StopRequested

# typer carries click inside; this is its base of all usage errors, which it does not export
UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Run a vision-language model once, then train cross-layer transcoders from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Options of every command; `--debug` is looked for in `main`."""


COMMANDS: dict[str, Callable[..., None]] = {
    "harvest": harvest_command,
    "plan": plan_command,
    "info": info,
    "verify": verify,
    "push": push_command,
    "pull": pull_command,
    "train": train_command,
    "eval": eval_command,
    "features": features_command,
    "calibrate": calibrate_command,
    "export": export_command,
    "import": import_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _fail(fault: BaseException, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(fault)
    text = _usage_text(fault) if isinstance(fault, UsageError) else str(fault)
    print(f"error: {' '.join(text.split()) or type(fault).__name__}", file=sys.stderr)
    sys.exit(code)


def _usage_text(fault: Any) -> str:
    """What is wrong with the words that were typed, what the option is for, and how the command is called."""
    text: str = fault.format_message()
    context, purpose = getattr(fault, "ctx", None), getattr(getattr(fault, "param", None), "help", None)
    if purpose:
        text = f"{text.rstrip('.')}: {purpose}"
    if context is None:
        return text
    usage = context.get_usage().removeprefix("Usage: ")
    return f"{text.rstrip('.')}; usage: {usage}, see `{context.command_path} --help`"


def main() -> None:
    """Entry point; decides what the user reads and the exit code."""
    _allow_many_files()
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, prog_name="clt", standalone_mode=False)
    except EndedByOthers as end:
        code = end.code
    except UsageError as fault:
        _fail(fault, BAD_USAGE, debug)
    except (StopRequested, KeyboardInterrupt, typer.Abort) as fault:
        _fail(
            RuntimeError(
                "interrupted; what was saved is kept, go on with the same command (train: and --resume)"
            )
            if not debug
            else fault,
            INTERRUPTED,
            debug,
        )
    except ValueError as fault:
        from .cache_format.errors import DamagedCacheError

        _fail(fault, FAULTY if isinstance(fault, DamagedCacheError) else BAD_USAGE, debug)
    except OSError as fault:
        _fail(_explain(fault), BAD_USAGE, debug)
    sys.exit(code if isinstance(code, int) else OK)


def _allow_many_files() -> None:
    """A cache of 10 M tokens has 80,000 shards; most systems allow 1,024 open files until they are asked."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _explain(fault: OSError) -> OSError | RuntimeError:
    """A disk that is full, in words."""
    if fault.errno != 28:  # ENOSPC
        return fault
    where = f" ({fault.filename})" if fault.filename else ""
    return RuntimeError(
        f"the disk is full{where}; what was committed is kept, free some space and run again "
        "(train: with --resume)"
    )


if __name__ == "__main__":
    main()
