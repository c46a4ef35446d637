"""`horovod-lm bench throughput`: both backends against peers, and against bare matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage, Turns
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Rounds, interleave
from horovod_lm.bench.tools import PEERS, PeerKind
from horovod_lm.bench.training import arguments
from horovod_lm.config import Config, with_keys
from horovod_lm.errors import UserError
from horovod_lm.topology import usable_cores

WORKS = "horovod_lm.bench.training:"
BACKENDS = {"torch": "torch backend", "tensorflow": "TensorFlow backend"}
# What the figures should reach, at the two sizes of docs/bench.md: width, layers, context.
PEER_AIMS = {
    (256, 4, 256): {"torch": 1.2, "tensorflow": 1.15},
    (512, 6, 128): {"torch": 1.3, "tensorflow": 1.3},
}
CEILING_AIMS = {"torch": 0.9, "tensorflow": 0.85}
TWIN_AIM = 0.95  # TensorFlow against torch
PRECISION_AIMS = {"bf16": 1.6, "fp16": 0.9}  # against our own fp32

COLUMNS = (
    Column("threads", "threads"),
    Column("precision", "precision"),
    Column("contestant", "contestant"),
    Column("tokens_per_second", "tokens/s", digits=4),
    Column("interval", "95% interval", digits=4),
    Column("share", "of torch's", share=True),
    Column("share_onednn", "of oneDNN's", share=True),
    Column("first_seconds", "1st step, s"),
    Column("memory_mib", "MiB"),
)


def measure(
    config: Config,
    *,
    precisions: Sequence[str],
    threads: Sequence[int],
    peers: Sequence[str],
    rounds: int,
    seconds: float,
) -> BenchResult:
    """Measure each precision on each number of threads: `rounds` rounds of turns of `seconds`.

    `peers` are names of `PEERS`. Raises `UserError` for what peers can't be or are not installed.
    """
    kinds = [kind for kind in PEERS if kind.name in peers]
    check_peers(config, kinds)
    config = with_keys(config, train={"micro_batch_size": None})
    races = [Race(config, count, precision, kinds) for count in threads for precision in precisions]
    model = config.model
    result = BenchResult(
        "throughput",
        f"Width {model.width}, {model.layers} layers, context {model.context}, "
        f"vocabulary {model.vocabulary}, batch {config.train.global_batch_size}",
        COLUMNS,
        group_by=("threads", "precision"),
        settings={
            "rounds": rounds,
            "seconds": seconds,
            "model": model.model_dump(mode="json"),
            "batch": config.train.global_batch_size,
            "flops_per_token": model.flops_per_token(),
        },
    )
    turns = rounds * sum(race.size for race in races)
    with Display(turns, "tokens") as display, Stage() as stage:
        display.say(
            f"{turns} turns of {seconds:g} s ({turns * seconds / 60:.1f} min), and the time in "
            f"which {sum(race.size for race in races)} contestants start and compile"
        )
        for race in races:
            race.run(stage, display, rounds, seconds)
            race.report(result)
            stage.clear()
    result.notes += _notes(config, threads)
    return result


def check_peers(config: Config, peers: Sequence[PeerKind]) -> None:
    """Raise `UserError` unless the peers are installed and can be what the config describes:
    GPT-2, trained with AdamW."""
    model = config.model
    wanted = {
        "model.kind": (model.kind, "decoder"),
        "model.norm_placement": (model.norm_placement, "pre"),
        "model.positions": (model.positions, "learned"),
        "model.bias": (model.bias, True),
        "model.tied": (model.tied, True),
        "model.segments": (model.segments, 0),
        "optimizer.name": (config.optimizer.name, "adamw"),
    }
    for key, (given, needed) in wanted.items():
        if peers and given != needed:
            raise UserError(
                f"{key} = {given} can't be measured against peers, which need {needed}; "
                f"set it so, or give --peers none"
            )
    for peer in peers:
        if find_spec(peer.package) is None:
            raise UserError(
                f"the peer {peer.name} needs the package {peer.package}, which is not installed; "
                f"{peer.mend}, or leave it out of --peers"
            )


@dataclass
class Race:
    """All contestants of one precision on one number of threads, measured together."""

    config: Config
    threads: int
    precision: str
    peers: Sequence[PeerKind]
    turns: list[Turns] = field(default_factory=list)
    rounds: Rounds = field(default_factory=Rounds)

    @property
    def _peers(self) -> list[PeerKind]:
        return [peer for peer in self.peers if self.precision in peer.precisions]

    @property
    def size(self) -> int:
        """How many contestants there are, at most."""
        own = 2 if self.precision == "fp32" else 4
        return own + len(self._peers) + 3

    def _own(self, backend: str, precision: str) -> str:
        return BACKENDS[backend] + ("" if precision == self.precision else f", {precision}")

    def run(self, stage: Stage, display: Display, rounds: int, seconds: float) -> None:
        """Start all of them, and let them take their turns."""

        def begin(name: str, work: str, backend: str, precision: str, **more: Any) -> None:
            ours = work != "PeerTraining"
            config = with_keys(
                self.config, launch={"backend": backend}, train={"precision": precision}
            )
            process = stage.start(
                name,
                WORKS + work,
                arguments(config, self.threads, **more),
                config=config if ours else None,
                threads=self.threads,
            )
            for part in process.parts:
                bare = work == "Ceiling"
                label = f"products by {part}" if bare else name
                turns = process.contestant(label, part, 1 / per_token if bare else 1.0)
                self.turns.append(turns)
                display.say(f"{label}: first step {turns.first_seconds:.1f} s")

        per_token = self.config.model.flops_per_token()
        count = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        display.say(f"{count}, {self.precision}: starting")
        for precision in dict.fromkeys((self.precision, "fp32")):
            for backend in BACKENDS:
                begin(self._own(backend, precision), "OwnTraining", backend, precision)
        for peer in self._peers:
            begin(peer.label, "PeerTraining", peer.backend, self.precision, peer=peer.name)
        for backend in BACKENDS:
            begin(f"products by {backend}", "Ceiling", backend, self._ceiling_precision)
        display.say(f"{count}, {self.precision}: measuring {len(self.turns)} contestants")
        self.rounds = interleave(self.turns, rounds, seconds, display.turn)

    @property
    def _ceiling_precision(self) -> str:
        # On CPUs without fp16 instructions both frameworks' fp16 is fp32 with roundings.
        return "fp32" if self.precision == "fp16" else self.precision

    def report(self, result: BenchResult) -> None:
        """Add the rows and the ratios."""
        per_token = self.config.model.flops_per_token()
        ceilings = {
            "share": "products by torch",
            "share_onednn": "products by oneDNN",
            "share_tensorflow": "products by TensorFlow",
        }
        for turns in self.turns:
            row: dict[str, Any] = {
                "threads": self.threads,
                "precision": self.precision,
                "contestant": turns.label,
                "tokens_per_second": self.rounds.rate(turns.label),
                "interval": self.rounds.interval(turns.label),
                "rounds": self.rounds.rates(turns.label),
                "flops_per_second": self.rounds.rate(turns.label) * per_token,
                "first_seconds": turns.first_seconds,
                "memory_mib": turns.memory_mib,
            }
            for key, ceiling in ceilings.items():
                known = ceiling in self.rounds.samples
                row[key] = self.rounds.ratio(turns.label, ceiling)[0] if known else None
            result.rows.append(row)
        result.ratios += self._ratios()

    def _ratios(self) -> list[Ratio]:
        model = self.config.model
        aims = PEER_AIMS.get((model.width, model.layers, model.context), {})
        at_fp32 = self.precision == "fp32"
        ratios: list[Ratio] = []

        def add(name: str, one: str, two: str, aim: float | None) -> None:
            if two in self.rounds.samples:
                value, interval = self.rounds.ratio(one, two)
                where = {"threads": self.threads, "precision": self.precision}
                ratios.append(Ratio(name, value, interval, aim, where=where))

        for backend, label in BACKENDS.items():
            rivals = [peer.label for peer in self._peers if peer.backend == backend]
            if rivals:
                best = self.rounds.fastest(rivals)
                add(f"{label} / {best}", label, best, aims.get(backend) if at_fp32 else None)
        names = list(BACKENDS.values())
        add("TensorFlow / torch backend", names[1], names[0], TWIN_AIM if at_fp32 else None)
        for backend, label in BACKENDS.items():
            aim = CEILING_AIMS[backend] if at_fp32 and aims else None
            add(f"{label} / torch's products", label, "products by torch", aim)
            add(f"{label} / oneDNN's products", label, "products by oneDNN", None)
        add(f"{names[1]} / its products", names[1], "products by TensorFlow", None)
        if not at_fp32:
            for backend, label in BACKENDS.items():
                aim = PRECISION_AIMS[self.precision]
                add(f"{label} / its own fp32", label, self._own(backend, "fp32"), aim)
        return ratios


def _notes(config: Config, threads: Sequence[int]) -> list[str]:
    notes = [
        "Of torch's, of oneDNN's: the share of the rate at which that library does the model's "
        "matrix products alone.",
    ]
    if max(threads) > usable_cores():
        notes.append(
            f"{max(threads)} threads share {usable_cores()} cores here, so their speeds say little."
        )
    if config.model.dropout != config.model.attention_dropout:
        notes.append("KerasHub has one rate of dropout: model.dropout.")
    return notes
