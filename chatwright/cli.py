"""The command line: each verb is a file of commands/ or stages/; only the verb that is used is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from chatwright import discovery, streams
from chatwright.config import UsageError, UserError, fail, near_match

FIRST = ("run", "chat", "generate", "serve")
"""The commands that most people type; the help lists them first."""
PRINTING = ("chat", "generate", "compare", "key")
"""Commands whose output is what they are for: they end when its reader has gone. All others do their work to
its end, whoever reads what they say about it."""


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
    if command is not None and verb in PRINTING:
        return int(command.load().main(arguments))
    with streams.steady("stdout"):
        return _work(verb, arguments)


def _work(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb that does more than print. Raises UsageError when there is none of that name."""
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
    streams.prepare()
    with streams.steady("stderr"):
        try:
            try:
                return _answer(arguments)
            finally:
                sys.stdout.flush()  # now, for at exit nobody could say anything about an error
        except UserError as error:
            return fail(error, debug="--debug" in arguments)
        except KeyboardInterrupt:
            print("chatwright: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            streams.leave(sys.stdout)
            return 1


def _answer(arguments: Sequence[str]) -> int:
    """What `main` returns for these arguments. Raises UserError."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from chatwright import __version__

        print(f"chatwright {__version__}")
        return 0
    return _run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
