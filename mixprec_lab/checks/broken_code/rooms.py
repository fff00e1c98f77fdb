"""The catalogue of the museum: one room is one value; the page ``broken_code`` and the exhibit show them in this order.

``defects`` are the entries of the project's list of 64 mistakes in the study note that the course mirrors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: The themes in the order of the page, each with its heading.
THEMES: Mapping[str, str] = MappingProxyType({
    "reports": "Numbers and reports",
    "scaling": "Autocast and loss scaling",
    "weights": "Weights and formats",
    "eight_bits": "FP8",
    "timing": "Timing",
    "monitor": "Watching",
    "repair": "Repairing",
})  # fmt: skip
#: What a difficulty of 1, 2 or 3 is called.
LEVELS: Mapping[int, str] = MappingProxyType({1: "Easy", 2: "Medium", 3: "Hard"})


@dataclass(frozen=True)
class Room:
    """One piece of broken code: its check is ``checks.broken_code.<name>``, its place on the page ``anchor``."""

    name: str
    title: str
    theme: str
    difficulty: int  #: 1 to 3
    chapter: str  #: where the subject is taught
    defects: tuple[int, ...]
    crashes: bool = False  #: whether using it as it was meant raises an error

    @property
    def anchor(self) -> str:
        """The fragment of the page's address that leads to the room."""
        return f"room-{self.name.replace('_', '-')}"


#: By theme, and by difficulty within a theme.
ROOMS: tuple[Room, ...] = (
    Room("uncalled_report", "The report that never reports", "reports", 1, "formats", (1,)),
    Room("smallest_value", "The smallest number that is not", "reports", 1, "formats", (3,)),
    Room("range_verdict", "The value that was fine", "reports", 1, "formats", (4,)),
    Room("forgotten_cast", "BF16 without error", "reports", 1, "rounding", (5,)),
    Room("bare_except", "The error that hides a typo", "reports", 1, "formats", (6,)),
    Room("tensor_format", "A tensor in an f-string", "reports", 1, "rounding", (24,), crashes=True),
    Room("lost_share", "Everything underflows", "reports", 2, "formats", (2,)),
    Room("promoted_sum", "The BF16 sum in FP32", "reports", 2, "rounding", (7,)),
    Room("narrow_sample", "An experiment without range", "reports", 2, "bf16_vs_fp16", (25,)),
    Room("walk_around_zero", "Updates without a weight", "reports", 2, "master_weights", (26,)),
    Room("blamed_sum", "The wrong culprit", "reports", 3, "rounding", (8,)),
    Room("old_name", "The name of yesterday", "scaling", 1, "amp", (9,)),
    Room("late_record", "A step behind", "scaling", 1, "loss_scaling", (13,)),
    Room("no_floor", "Halved once too often", "scaling", 1, "loss_scaling", (15,)),
    Room("silent_cpu", "Mixed precision that is off", "scaling", 2, "amp", (10,)),
    Room("clipped_too_early", "Clipped to nothing", "scaling", 2, "loss_scaling", (11, 19)),
    Room("one_read_a_step", "The price of a progress bar", "scaling", 2, "speed", (12,)),
    Room("spent_generator", "The loop that ran on nothing", "scaling", 2, "loss_scaling", (14,)),
    Room("no_ceiling", "Doubled once too often", "scaling", 2, "loss_scaling", (16,)),
    Room("overflowing_loss", "A loss of 3 is too much", "scaling", 2, "loss_scaling", (17,)),
    Room("half_quotient", "Undone by undoing", "scaling", 2, "loss_scaling", (18,)),
    Room("read_per_tensor", "One question for each tensor", "scaling", 3, "speed", (20,)),
    Room("missing_case", "No answer is an answer", "weights", 1, "bf16_vs_fp16", (27,)),
    Room("missing_import", "The missing letter", "weights", 1, "amp", (31, 44), crashes=True),
    Room("rounded_ids", "The word that became another", "weights", 1, "bf16_vs_fp16", (34,)),
    Room("two_dtypes", "Two halves that do not fit", "weights", 1, "bf16_vs_fp16", (35,), crashes=True),
    Room("by_name", "Found by name, missed by name", "weights", 1, "bf16_vs_fp16", (36,)),
    Room("wrong_parameters", "The master that never worked", "weights", 2, "master_weights", (21,)),
    Room("kept_gradients", "The sum nobody asked for", "weights", 2, "master_weights", (22,)),
    Room("raw_half_gradient", "Straight from FP16", "weights", 2, "master_weights", (23,)),
    Room("habit", "FP16 for speed", "weights", 2, "bf16_vs_fp16", (29, 30)),
    Room("half_everything", "The optimizer handles precision", "weights", 2, "master_weights", (33,)),
    Room("backward_dtype", "The FP32 backward pass", "weights", 3, "amp", (28,)),
    Room("clipped_copies", "A clip without a grip", "weights", 3, "bf16_vs_fp16", (32,)),
    Room("wrong_module", "An address that never existed", "eight_bits", 1, "fp8", (37,), crashes=True),
    Room("renamed_context", "Yesterday's name, again", "eight_bits", 1, "fp8", (40,)),
    Room("direct_children", "Only the first floor", "eight_bits", 1, "fp8", (42,)),
    Room("any_shape", "Any size will do", "eight_bits", 1, "fp8", (44,)),
    Room("ignored_argument", "The argument that nobody reads", "eight_bits", 2, "fp8", (38,)),
    Room("half_parameters", "Half the parameters, none of the care", "eight_bits", 2, "amp", (41,), crashes=True),
    Room("early_optimizer", "Training the layer that left", "eight_bits", 2, "fp8", (43,)),
    Room("swallowed_error", "Not available here", "eight_bits", 2, "fp8", (45, 49)),
    Room("one_format", "Forward format, backward too", "eight_bits", 3, "fp8", (39,)),
    Room("cold_start", "The first call pays", "timing", 1, "speed", (46,)),
    Room("running_queue", "Somebody else's work", "timing", 2, "speed", (47,)),
    Room("unequal_arms", "One arm carries more", "timing", 2, "speed", (48,)),
    Room("forward_only", "Half a training step", "timing", 2, "speed", (50,)),
    Room("other_key", "The count that is always zero", "monitor", 1, "amp", (51,)),
    Room("stable_nan", "Looks stable", "monitor", 1, "loss_scaling", (52,)),
    Room("forgotten_issue", "Seen and not said", "monitor", 1, "amp", (53,)),
    Room("mean_of_norms", "Two kinds of norm", "monitor", 2, "loss_scaling", (54,)),
    Room("scaled_threshold", "An explosion of 65,536", "monitor", 2, "loss_scaling", (56,)),
    Room("three_reads", "The watchman who stops the work", "monitor", 3, "speed", (55,)),
    Room("raised_scale", "A reset upwards", "repair", 1, "loss_scaling", (61,)),
    Room("punished_rate", "Punished for breathing", "repair", 1, "loss_scaling", (62,)),
    Room("moving_checkpoint", "A checkpoint that trains along", "repair", 2, "amp", (57,)),
    Room("no_buffers", "What a model is made of", "repair", 2, "amp", (58,)),
    Room("live_copy", "A copy on a leash", "repair", 2, "master_weights", (59,)),
    Room("half_a_checkpoint", "Half a checkpoint", "repair", 2, "amp", (64,), crashes=True),
    Room("private_scale", "The door marked private", "repair", 3, "amp", (60,), crashes=True),
    Room("zeroed_step", "A step with nothing in it", "repair", 3, "amp", (63,)),
    Room("poisoned_state", "The memory of a NaN", "repair", 3, "amp", (64,)),
)
