"""The package from the shell: ``python -m mixprec_lab COMMAND`` (or ``mixprec COMMAND`` once it is installed).

A command asks the library one question and prints the answer, as text or, with ``--json``, as one JSON object.
Exit status: 0 the answer is there; 1 the doctor says that the book does not run here; 2 the question made no sense,
which is one line on standard error.  torch is imported by the commands that need it, not by ``--help``.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Answer = tuple[dict[str, Any], str]
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)([KMBT]?)", re.IGNORECASE | re.ASCII)
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NEGATIVE = re.compile(r"-(?=[\d.]|inf$|infinity$|nan$)", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class BadQuestion(Exception):
    """What the user wrote has no answer; the message says what was expected."""


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Around a call of the library with what the user wrote: its refusals become ``BadQuestion``."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadQuestion(" ".join(str(error.args[0] if error.args else error).split())) from error


def doctor(options: argparse.Namespace) -> Answer:
    """What this machine can do for the book."""
    from mixprec_lab.doctor import examine

    report = examine()
    return report.as_dict(), str(report)


def recommend(options: argparse.Namespace) -> Answer:
    """Formats, scaling and caveats for a hardware and a task."""
    from mixprec_lab.bf16_vs_fp16 import recommend as ask

    with _asked():
        found = ask(options.hardware, options.task, priority=options.priority)
    answer = {"hardware": found.hardware.name, "task": found.task.name, "priority": found.priority,
              "why_hardware": found.why_hardware, **found.as_dict()}  # fmt: skip
    answer["reasons"] = [
        {"field": field, "value": d.value, "reason": d.reason, "source": d.source.title, "date": d.date}
        for field, d in found.decisions()
    ]
    return answer, found.explain() if options.explain else str(found)


def parse_count(text: str) -> int | str:
    """A number of parameters: ``7000000000``, ``7_000_000_000`` or ``7B`` -> an int; anything else is a model's name.

    K, M, B and T are powers of ten.  Raises ValueError for a count that is not a whole number: ``1.0005K``.
    """
    if (match := _COUNT.fullmatch(text)) is None:
        return text
    whole, _, part = match[1].replace("_", "").partition(".")
    count, rest = divmod(int(whole + part) * _SUFFIXES[match[2].upper()], 10 ** len(part))
    if rest:
        raise ValueError(f"expected a whole number of parameters, got {text}")
    return count


MEMORY_SIZES = ("layers", "hidden", "heads", "sequence", "batch", "vocabulary")


def memory(options: argparse.Namespace) -> Answer:
    """The bytes that a training step takes on one GPU, term by term."""
    from mixprec_lab.memory import GPUS, MODELS, regime_table, training_memory

    if options.list:
        text = f"{regime_table()}\n\nmodels: {', '.join(MODELS)}\nGPUs: {', '.join(GPUS)}"
        return {"regimes": _regimes(), "models": list(MODELS), "gpus": list(GPUS)}, text
    if options.model is None:
        raise BadQuestion("expected a number of parameters or a model's name: memory 7B, memory llama3_8b, or --list")
    names = (*MEMORY_SIZES, "zero_stage", "world_size", "activation_checkpointing", "attention", "dropout", "policy",
             "adapters", "base")  # fmt: skip
    with _asked():
        bill = training_memory(parse_count(options.model), options.regime, **{n: getattr(options, n) for n in names})
        fits, shown = {name: bill.fits(name) for name in GPUS}, str(bill)
    answer = {
        "parameters": bill.parameters, "regime": bill.regime.name, "source": bill.regime.source, "total": bill.total,
        "states": bill.states, "bytes_per_parameter": bill.bytes_per_parameter, "fits": fits,
        "terms": {name: {"bytes": term.bytes, "expression": term.expression} for name, term in bill.terms.items()},
    }  # fmt: skip
    return answer, f"{shown}\nfits: {', '.join(name for name, fit in fits.items() if fit) or 'none of the GPUs listed'}"


def _regimes() -> dict[str, float]:
    from mixprec_lab.memory import REGIMES

    return {name: regime.bytes_per_parameter for name, regime in REGIMES.items()}


def bench(options: argparse.Namespace) -> Answer:
    """Products of square matrices in every format of the device, against FP32."""
    from mixprec_lab.speed.quick import quick_bench

    with _asked():
        found = quick_bench(options.device, options.size, options.rounds)
    return found.as_dict(), str(found)


def explore(options: argparse.Namespace) -> Answer:
    """What every format makes of a number: bits, value, error, neighbours."""
    from mixprec_lab.exhibits._text import parse_number, shortest
    from mixprec_lab.formats import FORMATS, get_format, text_table

    with _asked():
        x = parse_number(options.number)
        formats = [get_format(name) for name in options.format or FORMATS]
    rows = [_explored(x, fmt) for fmt in formats]
    heads = ("format", "bits", "value", "error", "below", "above")
    text = text_table(list(heads), [[_cell(row[head]) for head in heads] for row in rows])
    return {"number": _json_number(x), "formats": rows}, f"{shortest(x)}, rounded to nearest\n{text}"


def _explored(x: float, fmt: Any) -> dict[str, Any]:
    from mixprec_lab.formats import bits_of, neighbours

    row = dict.fromkeys(("format", "title", "code", "bits", "value", "kind", "error", "below", "above"))
    row |= {"format": fmt.name, "title": fmt.title}
    if math.isnan(x) and not fmt.has_nan:
        return row
    bits = bits_of(x, fmt)
    finite = math.isfinite(x) and math.isfinite(bits.value) and x != 0
    below, above = (None, None) if math.isnan(bits.value) else neighbours(bits.value, fmt)
    return row | {
        "code": bits.code, "bits": bits.pattern, "value": _json_number(bits.value), "kind": bits.kind,
        "error": _json_number(abs(bits.value - x) / abs(x)) if finite else None,
        "below": _json_number(below), "above": _json_number(above),
    }  # fmt: skip


def _json_number(x: float | None) -> float | str | None:
    """JSON has no inf and no NaN: they are strings."""
    return x if x is None or math.isfinite(x) else str(x)


def _cell(x: object) -> str:
    from mixprec_lab.exhibits._text import significant

    return "-" if x is None else significant(x, 6) if isinstance(x, float) else str(x)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="mixprec", description="Mixed-precision training from the shell.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _command(commands, doctor, "0 if the book runs here, 1 if not; problems come with their cure")
    p = _command(commands, recommend, "an unknown name is answered with the known ones")
    p.add_argument("hardware", nargs="?", default="auto", help="h100, 'NVIDIA T4', cpu, ... (default: this machine)")
    p.add_argument("task", nargs="?", default="llm_pretraining", help="lora, ... (default: llm_pretraining)")
    p.add_argument("--priority", default="stability", help="stability (default) or speed")
    p.add_argument("--explain", action="store_true", help="every decision with its reason, source and date")
    _memory_options(_command(commands, memory, "for example: memory llama3_8b bf16_master --sequence 8192 --batch 1"))
    p = _command(commands, bench, "seconds of a product, median and quartiles, with machine and date")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: MIXPREC_DEVICE, else CUDA, else the CPU)")
    p.add_argument("--size", type=int, help="rows and columns of the matrices (default: 512 on a CPU, 4096 on a GPU)")
    p.add_argument("--rounds", type=int, default=7, help="timings of each format (default: 7)")
    p = _command(commands, explore, "numbers as in 0.1, 1e-8, 2^-24, 0x1p-3, -0, inf, nan")
    p.add_argument("number")
    p.add_argument("--format", action="append", help="fp16, bf16, fp8_e4m3, ... (default: all; may be repeated)")
    return parser


def _command(commands: Any, function: Callable[[argparse.Namespace], Answer], more: str) -> argparse.ArgumentParser:
    line = (function.__doc__ or "").splitlines()[0]
    parser = commands.add_parser(function.__name__, help=line, description=line, epilog=more)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(function=function)
    return parser


def _memory_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", help="a number of parameters (7B, 124_439_808) or a model of --list")
    p.add_argument("regime", nargs="?", default="autocast", help="what is kept in which format (default: autocast)")
    p.add_argument("--list", action="store_true", help="the regimes, models and GPUs by name")
    p.add_argument("--zero-stage", type=int, default=0, help="0 (default) to 3: what is sharded over --world-size GPUs")
    p.add_argument("--world-size", type=int, default=1)
    for name in MEMORY_SIZES:
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--activation-checkpointing", action="store_true")
    p.add_argument("--attention", default="flash", help="flash (default) or full")
    p.add_argument("--dropout", action="store_true")
    p.add_argument("--policy", default="cuda", help="whose autocast lists: cuda (default) or cpu")
    p.add_argument("--adapters", type=int, default=0, help="trained LoRA parameters beside a frozen model")
    p.add_argument("--base", default="bf16", help="the format of that frozen model (default: bf16; nf4)")


def main(arguments: list[str] | None = None) -> int:
    """Answer one command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["explore"]:  # argparse takes -2^-3 and -inf for options; a true minus sign is none
        given = [_NEGATIVE.sub("\u2212", a, count=1) for a in given]
    parser = make_parser()
    options = parser.parse_args(given)
    try:
        answer, text = options.function(options)
    except BadQuestion as error:
        print(f"mixprec {options.command}: {error}", file=sys.stderr)
        return 2
    status = int(options.function is doctor and not answer["runs"])
    try:
        print(json.dumps(answer, indent=1, ensure_ascii=False, allow_nan=False) if options.json else text, flush=True)
    except BrokenPipeError:  # ``| head`` has read enough; Python would print a traceback, and another one at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
