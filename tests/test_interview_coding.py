"""Coding questions: a stub is not done, the solution is correct, and a plausible wrong answer is refused."""

import pytest

from mixprec_lab import checks
from mixprec_lab.interview import get_question, load_bank
from mixprec_lab.interview.coding import OWN, get_check, run_check

TASKS = [q for q in load_bank() if q.code]
WRONG = {
    "code-scaler-class": {
        "never skips": ("self.scale, self.clean = self.scale / 2, 0\n            return False",
                        "self.scale, self.clean = self.scale / 2, 0"),
        "keeps the count over an overflow": ("self.scale / 2, 0", "self.scale / 2, self.clean"),
        "forgets to clear the count at a growth": ("self.scale * 2, 0", "self.scale * 2, self.clean"),
        "looks for infinity only": ("all(g.isfinite().all() for g in gradients)",
                                    "all(not g.isinf().any() for g in gradients)"),
        "does not unscale": ("g /= self.scale", "pass"),
        "grows one step late": ("self.clean == self.window", "self.clean > self.window"),
    },
    "code-clip": {
        "enlarges small gradients": ("if norm > max_norm:", "if True:"),
        "does not unscale": ("g /= scale", "pass"),
        "returns the clipped norm": ("return norm", "return min(norm, max_norm)"),
    },
    "code-pairwise": {
        "adds in FP32": ("return values", "return values.float()"),
        "adds the halves instead of neighbours": ("values[0::2] + values[1::2]",
                                                  "values[: len(values) // 2] + values[len(values) // 2 :]"),
        "leaves the sum to torch": ("while values.numel() > 1:", "return values.sum()\n    while values.numel() > 1:"),
    },
    "code-losing-ratio": {
        "adds in Python's floats": ("one + torch.tensor(1 / r, dtype=dtype) != one", "1.0 + 1 / r != 1.0 and r < 5000"),
        "is off by one": ("return r", "return r - 1"),
    },
    "code-blockwise-fp8": {"forgets zero blocks": ("torch.where(scale > 0, scale, 1.0)", "scale"),
                           "scales by the mean": (".amax(-1, keepdim=True)", ".mean(-1, keepdim=True)")},
    "code-kahan": {"has the sign of the compensation wrong": ("v - lost", "v + lost")},
    "code-whole-loop": {
        "adds up old gradients": ("optimizer.zero_grad()", "pass"),
        "clips the scaled gradient": ("scaler.unscale_(optimizer)", "pass"),
        "moves the schedule at a skip": ("scaler.get_scale() >= before", "True"),
        "never moves the schedule": ("scaler.get_scale() >= before", "False"),
        "does not clip": ("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass"),
        "trains on stale copies": (
            "    for x, y in batches:\n        with torch.autocast('cpu', dtype=torch.float16):".replace("'", '"'),
            "    with torch.autocast('cpu', dtype=torch.float16):\n      for x, y in batches:\n        if True:",
        ),
    },
    "code-zero-bytes": {"shards in the wrong order": ("((12, 1), (2, 2), (2, 3))", "((12, 3), (2, 2), (2, 1))")},
    "code-guarded-step": {"always steps": ("if norm.isfinite():", "if True:")},
    "code-mx-scale": {"truncates the logarithm": ("math.frexp(amax)[1] - 1", "int(math.log2(amax))")},
}  # fmt: skip
MUTANTS = [(id, name) for id, mutants in WRONG.items() for name in mutants]


def verdict(q, source: str, capsys) -> str:
    run_check(q.code, source)
    return capsys.readouterr().out.strip()


def test_there_are_at_least_ten_tasks_and_every_own_check_is_used():
    assert len(TASKS) >= 10
    assert set(OWN) <= {q.code.check for q in TASKS}
    assert not set(OWN) & set(checks.__all__)


@pytest.mark.parametrize("q", TASKS, ids=lambda q: q.id)
def test_the_stub_is_not_done_and_the_solution_is_correct(q, capsys):
    assert verdict(q, q.code.stub, capsys) == "Not done yet."
    assert verdict(q, q.code.solution, capsys) == "Correct."


@pytest.mark.parametrize(("id", "name"), MUTANTS)
def test_a_wrong_answer_is_told_what_was_expected(id, name, capsys):
    q, (old, new) = get_question(id), WRONG[id][name]
    assert q.code.solution.count(old) == 1
    assert verdict(q, q.code.solution.replace(old, new), capsys).startswith("Not yet: expected ")


@pytest.mark.parametrize("name", sorted(OWN))
def test_an_answer_that_crashes_is_shown_and_not_raised(name, capsys):
    get_check(name)(lambda *a: 1 / 0)
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_an_unknown_check_and_a_missing_definition_are_refused():
    with pytest.raises(KeyError, match="expected a check, got 'nothing'; the names are scaler_class"):
        get_check("nothing")
    with pytest.raises(NameError, match="expected the source to define kahan_sum, got other"):
        run_check(get_question("code-kahan").code, "def other(): ...")
    with pytest.raises(NameError, match="got nothing"):
        run_check(get_question("code-kahan").code, "")
