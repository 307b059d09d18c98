"""The command line: each verb is a file of commands/ or stages/; only the verb that is used is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from chatwright import discovery
from chatwright.config import UsageError, UserError, fail, near_match

FIRST = ("run", "chat", "generate", "serve")
"""The commands that most people type; the help lists them first."""


def usage() -> str:
    """What `chatwright --help` prints."""
    commands, stages = discovery.commands(), discovery.stages()
    others = [name for name in commands if name not in FIRST]
    lines = [
        "usage: chatwright VERB [...]",
        "",
        "The road of the GPT lineage, from raw text to an aligned chat model.",
    ]
    lines += ["", "Commands:"]
    width = max(map(len, (*commands, *stages)))
    lines += [f"  {name:{width}} {commands[name].summary()}" for name in (*FIRST, *others)]
    lines += ["", "Stages (chatwright run RECIPE runs several, in order):"]
    lines += [f"  {name:{width}} {verb.summary()}" for name, verb in stages.items()]
    lines += ["", "chatwright VERB --help tells more. Exit codes: 0 done, 1 failed, 2 wrong arguments."]
    return "\n".join(lines)


def verbs() -> list[str]:
    """The names of all verbs."""
    return [*discovery.commands(), *discovery.stages()]


def _run(verb: str, arguments: Sequence[str]) -> int:
    """Import a verb and run it. Raises UsageError when there is none of that name."""
    command = discovery.commands().get(verb)
    if command is not None:
        return int(command.load().main(arguments))
    if discovery.current_name(verb) not in discovery.stages():
        raise UsageError(f"no verb is called {verb!r}{near_match(discovery.current_name(verb), verbs())}")
    from chatwright.commands._stage import main as run_stage

    return run_stage(verb, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from chatwright import __version__

        print(f"chatwright {__version__}")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except UserError as error:
        return fail(error, debug=debug)
    except KeyboardInterrupt:
        print("chatwright: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe has gone. Without this, flushing the buffer at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
