"""What is run: models, data, contenders, in the order of importance."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmark.lengths import SHORT, ULTRAFEEDBACK, ULTRAINTERACT, Table, fixed, shortened
from benchmark.shapes import SHAPES, Shape

SEED = 0
BETA = 0.1
ALPHA = 0.5  # temperature of NCA's rewards
LEARNING_RATE = 1e-6
THREADS = 2
PRECISION = "bf16"
WARM = 3  # steps before a step is timed: until then memory is touched for the first time

ALIGN, SHIPPED, TUNED, UNSHARED = "align", "TRL as shipped", "TRL tuned", "align without sharing"
# align's own types are bf16 products over fp32 weights and moments, so autocast over fp32 weights is its equal. In bf16
# weights AdamW's updates are mostly lost; that is tried once, and how many of them move is measured.
WEIGHTS, OTHER_WEIGHTS = "float32", "bfloat16"

COMPARED = ("target", "sharing")  # the parts of a plan that have targets

# What an ablation or a curve adds to align's command line.
OVERRIDES: dict[str, tuple[str, ...]] = {
    ALIGN: (),
    UNSHARED: ("model.rows=packed",),
    "align without sharing and packing": ("model.rows=padded",),
    "align without cache": ("reference=frozen",),
    "align with a plain head": ("model.head=plain",),
    "align, keeping all activations": ("engine.selective_recompute=false",),
    "align with checkpointing": ("engine.gradient_checkpointing=true",),
    "align in fp32": ("engine.precision=fp32",),
    "align, 1 rank of 1 thread": (),
    "align, 2 ranks of 1 thread": ("engine=zero1", "launch.devices=2"),
}
THREADS_OF = {"align, 1 rank of 1 thread": 1, "align, 2 ranks of 1 thread": 1}
ABLATIONS = (
    "align without sharing and packing",
    "align without cache",
    "align with a plain head",
    "align, keeping all activations",
    "align with checkpointing",
    "align in fp32",
)


@dataclass(frozen=True)
class Case:
    """Contenders on the same groups, round after round.

    Attributes:
        part: target, sharing, ablations, or the curve that it is a point of.
        responses: K.
        groups: of an optimizer step.
        warm, timed: optimizer steps that are thrown away, and that count.
        contenders: in the order of the first round; the second runs backwards, and so on.
        repeats: rounds.
        x: where on its curve.
    """

    part: str
    shape: Shape
    table: Table
    responses: int
    groups: int
    timed: int
    contenders: tuple[str, ...]
    repeats: int
    warm: int = WARM
    x: float = 0.0

    @property
    def name(self) -> str:
        """Unique in a plan."""
        place = "" if self.part in ("target", "ablations") else f" [{self.part}]"
        ablated = " [ablations]" if self.part == "ablations" else ""
        size = f", {self.rows:,} groups" if self.part == "dataset" else ""
        return f"{self.shape.name}, {self.table.name}, K = {self.responses}{size}{place}{ablated}"

    @property
    def steps(self) -> int:
        return self.warm + self.timed

    @property
    def rows(self) -> int:
        """Groups of the dataset: one epoch is all steps."""
        return self.groups * self.steps

    @property
    def algorithm(self) -> str:
        """K-wise training is NCA's, pairs are DPO's, one response can only be imitated."""
        return {1: "sft", 2: "dpo"}.get(self.responses, "nca")


@dataclass(frozen=True)
class Target:
    """A ratio that is to be reached: align's groups per second over the other's, its peak memory over the other's.

    `speed` None stands for nine tenths of the token ratio of the case.
    """

    against: str
    table: str
    responses: int
    speed: float | None
    memory: float | None


TARGETS = (
    Target(SHIPPED, ULTRAFEEDBACK.name, 2, 7.0, 0.5),
    Target(TUNED, ULTRAFEEDBACK.name, 2, 6.0, 0.5),
    Target(TUNED, ULTRAFEEDBACK.name, 4, 8.0, 0.4),
    Target(TUNED, ULTRAINTERACT.name, 2, 8.0, 0.4),
    *(Target(UNSHARED, table.name, k, None, None) for table in (ULTRAFEEDBACK, ULTRAINTERACT, SHORT) for k in (2, 4)),
)


def targets(
    shape: Shape, *, groups: tuple[int, int, int], timed: int, repeats: int, warm: int = WARM
) -> Iterator[Case]:
    """The cases in which TRL is compared with.

    Args:
        groups: of a step, for pairs of UltraFeedback's lengths, for four responses, for UltraInteract's lengths.
    """
    pairs, four, long = groups

    def case(table: Table, responses: int, size: int, *contenders: str) -> Case:
        return Case("target", shape, table, responses, size, timed, contenders, repeats, warm=warm)

    yield case(ULTRAFEEDBACK, 2, pairs, ALIGN, TUNED, SHIPPED)
    yield case(ULTRAFEEDBACK, 4, four, ALIGN, TUNED)
    yield case(ULTRAINTERACT, 2, long, ALIGN, TUNED)


def sharing(shape: Shape, *, groups: int, timed: int, repeats: int) -> Iterator[Case]:
    """What sharing alone gains: several steps are timed, because the ratio is near to one."""
    for table in (ULTRAFEEDBACK, ULTRAINTERACT, SHORT):
        for responses in (2, 4):
            yield Case("sharing", shape, table, responses, groups, timed, (ALIGN, UNSHARED), repeats)


def curves(shape: Shape, tiny: Shape, *, repeats: int) -> Iterator[Case]:
    """Over K, over P/R, over the number of tokens in the dataset, over ranks."""
    for k in range(1, 9):
        contenders = (ALIGN, TUNED) if k in (2, 4, 8) else (ALIGN,)
        yield Case("K", shape, ULTRAFEEDBACK, k, 4, 1, contenders, repeats, x=k)
    for ratio in (0.125, 0.5, 1.0, 2.0, 4.0, 8.0):
        prompt = round(800 * ratio / (1 + ratio))
        contenders = (ALIGN, UNSHARED, TUNED) if ratio in (0.125, 1.0, 8.0) else (ALIGN, UNSHARED)
        yield Case("P/R", shape, fixed(prompt, 800 - prompt), 2, 4, 1, contenders, repeats, x=ratio)
    ranks = ("align, 1 rank of 1 thread", ALIGN, "align, 2 ranks of 1 thread")
    yield Case("ranks", shape, ULTRAFEEDBACK, 2, 8, 2, ranks, repeats)
    for groups in (1024, 4096, 16384, 65536):
        yield Case("dataset", tiny, fixed(16, 24), 2, 64, groups // 64 - WARM, (ALIGN,), repeats, x=groups)


def full(repeats: int) -> list[Case]:
    """Everything."""
    small, large, tiny = SHAPES["30M"], SHAPES["135M"], SHAPES["tiny"]
    return [
        *targets(small, groups=(4, 2, 2), timed=1, repeats=repeats),
        # of TRL's steps, minutes each, two are thrown away: the third of the small model is as long as its fourth
        *targets(large, groups=(2, 1, 1), timed=1, repeats=repeats, warm=2),
        Case("ablations", small, ULTRAFEEDBACK, 2, 4, 1, (ALIGN, *ABLATIONS), min(repeats, 3)),
        *curves(small, tiny, repeats=1),
        *sharing(small, groups=4, timed=3, repeats=repeats),
        *sharing(large, groups=2, timed=3, repeats=repeats),
    ]


def quick(repeats: int) -> list[Case]:
    """The small model and the rows that compare with TRL."""
    return list(targets(SHAPES["30M"], groups=(4, 2, 2), timed=1, repeats=repeats))


def smoke(repeats: int) -> list[Case]:
    """Everything on a tiny model and a sixteenth of the tokens: whether it runs, not how fast."""
    tiny = SHAPES["tiny"]

    def little(case: Case) -> Case:
        if case.part == "dataset":
            return replace(case, timed=case.timed // 4)
        cut = shortened(case.table, 16)
        return replace(case, shape=tiny, table=cut, groups=4)

    cases = [
        *targets(tiny, groups=(4, 4, 4), timed=1, repeats=repeats),
        *sharing(tiny, groups=4, timed=1, repeats=1),
        Case("ablations", tiny, ULTRAFEEDBACK, 2, 4, 1, (ALIGN, *ABLATIONS), 1),
        *curves(tiny, tiny, repeats=1),
    ]
    wanted = {"target", "sharing", "ablations", "ranks"}
    return [little(case) for case in cases if case.part in wanted or case.x in (1, 4, 1.0, 1024, 4096)]
