"""How much of the accuracy of pooled photographs a federation keeps: the numbers of the documents.

::

    python tests/benchmarks/retention.py --out build/retention --cohort synthetic --seeds 5
    python tests/benchmarks/retention.py --out build/retention --report docs/explanation

The first form trains what ``--out`` lacks, one JSON line for each finished run: stop it whenever
you like, and call it again to go on. A run is a function of its setting. The second form reads the
lines and writes ``retention.json`` and ``retention.svg`` into a folder and the tables to standard
output.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from retention_report import write_report
from retention_study import (
    FULL,
    QUARTERS,
    RULES,
    SIDES,
    SPLITS,
    Photographs,
    Schedule,
    Setting,
    open_photographs,
    run,
    usual_schedule,
)

from fedgestalt.errors import FedgestaltError
from fedgestalt.federation.training.model import Optimiser


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """The runs that are asked for, seed by seed: whenever it stops, whole seeds are there."""
    for cohort, seed in itertools.product(arguments.cohort, range(1, arguments.seeds + 1)):
        common = {"cohort": cohort, "seed": seed, "on_validation": arguments.validation}
        for rounds_and_epochs in arguments.schedules or [None]:
            schedule = functools.partial(_schedule, arguments, rounds_and_epochs)
            if "centralised" in arguments.sides:
                yield Setting(side="centralised", schedule=schedule("centralised"), **common)
            for split, sites in itertools.product(arguments.splits, arguments.sites):
                place: dict[str, Any] = {"sites": sites, "split": split, **common}
                if "federated" in arguments.sides:
                    for rule in arguments.rules:
                        one = schedule("federated", rule)
                        yield Setting(side="federated", rule=rule, schedule=one, **place)
                if "local-only" in arguments.sides:
                    yield Setting(side="local-only", schedule=schedule("local-only"), **place)


def _schedule(
    arguments: argparse.Namespace,
    rounds_and_epochs: tuple[int, int] | None,
    side: str,
    rule: str = "",
) -> Schedule:
    """The usual schedule of a side with what the command line says otherwise."""
    usual = usual_schedule(side, rule)
    rounds, epochs = rounds_and_epochs or (usual.rounds, usual.epochs)
    momentum = usual.momentum if arguments.momentum is None else arguments.momentum
    optimiser, rate = usual.optimiser, usual.learning_rate
    if side == "federated":
        optimiser = arguments.server_optimiser or optimiser
        rate = arguments.server_learning_rate or rate
    training = {**usual.training, **dict(arguments.training)}
    return dataclasses.replace(
        usual,
        rounds=rounds,
        epochs=epochs,
        training=training,
        momentum=momentum,
        neck=arguments.neck,
        optimiser=optimiser,
        learning_rate=rate,
    )


def key_of(facts: dict[str, Any]) -> str:
    """One text for each setting."""
    return json.dumps(facts, sort_keys=True)


def run_all(wanted: Iterable[Setting], out: Path, name: str = "runs") -> None:
    """Run what is missing and append a line for each to ``out/NAME.jsonl``."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{name}.jsonl"
    if results.exists() and not results.read_bytes().endswith(b"\n"):
        with results.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # an interrupt cut the last line short
    todo = list(wanted)
    photographs: dict[tuple[str, str], Photographs] = {}
    for number, setting in enumerate(todo, 1):
        if key_of(setting.facts()) in {key_of(line["setting"]) for line in read_lines(out)}:
            continue
        started, computed = time.monotonic(), time.process_time()
        place = setting.cohort, setting.schedule.neck
        if place not in photographs:
            photographs = {place: open_photographs(*place)}
        try:
            found = run(setting, photographs[place])
        except FedgestaltError as error:
            found = {"impossible": str(error)}
        seconds, cpu = time.monotonic() - started, time.process_time() - computed
        line = {
            "setting": setting.facts(),
            "cpu_seconds": round(cpu, 1),
            "torch": torch.__version__,
            **found,
        }
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        what = [setting.cohort, f"seed {setting.seed}", setting.side, setting.split, setting.rule]
        what += [f"{setting.sites} sites" if setting.sites > 1 else ""]
        text = ", ".join(filter(None, what))
        sys.stderr.write(f"{number} of {len(todo)}: {text} ({seconds:.0f} s)\n")


def read_lines(out: Path) -> list[dict[str, Any]]:
    """All finished runs; a line that was cut short by an interrupt is left out."""
    lines = []
    for results in sorted(out.glob("*.jsonl")):
        for text in results.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def _pair(text: str) -> tuple[int, int]:
    rounds, epochs = text.split("x")
    return int(rounds), int(epochs)


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build/retention"))
    parser.add_argument("--name", default="runs", help="of the file; one for each process")
    parser.add_argument(
        "--backwards", action="store_true", help="begin at the end: a second process meets a first"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write tables and picture")
    parser.add_argument("--cohort", nargs="+", default=["synthetic"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--sites", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--schedules", nargs="+", type=_pair, metavar="ROUNDSxEPOCHS")
    parser.add_argument(
        "--training", nargs="*", type=_value, default=[], metavar="NAME=VALUE", help="TrainingSpec"
    )
    parser.add_argument("--neck", choices=(QUARTERS, FULL), default=QUARTERS)
    parser.add_argument("--momentum", type=float, help="of the server")
    parser.add_argument("--server-optimiser", choices=[kind.value for kind in Optimiser])
    parser.add_argument("--server-learning-rate", type=float, help="of the server's optimiser")
    parser.add_argument(
        "--validation", action="store_true", help="rank validation photographs: to choose settings"
    )
    return parser.parse_args(words)


def main() -> None:
    """Do what the command line asks for."""
    arguments = read_arguments()
    if arguments.report:
        write_report(read_lines(arguments.out), arguments.report)
        return
    torch.set_num_threads(1)
    wanted = list(settings(arguments))
    run_all(wanted[::-1] if arguments.backwards else wanted, arguments.out, arguments.name)


if __name__ == "__main__":
    main()
