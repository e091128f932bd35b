"""`make mutants`: plants one fault at a time and asks the tests that should notice. One that lives is a hole in them.

Each fault is a textual replacement in one file of a copy of the tree. The old text must occur exactly once, so a fault
cannot silently miss its place after a refactoring. The named tests must pass without the fault, or their failing with
it would mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "pyproject.toml")

PASSED, FAILED = 0, 1
"""pytest's exit codes; every other means that the tests could not run."""

PATIENCE_SECONDS = 300
"""A fault that makes the tests hang is noticed, too."""


class BadMutant(Exception):
    """The fault or its tests do not fit the tree any more; the table must be mended."""


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    name: str
    file: str  # relative to the tree
    old: str  # occurs exactly once
    new: str
    tests: tuple[str, ...]  # pytest node ids that should fail


CORE, PAIRS, BLOCKS = "tests/engine/test_core.py", "tests/engine/test_pairs.py", "tests/cache/test_blocks.py"
FAMILIES = "tests/models/test_families.py::test_whole_chunked_and_batched_logits_equal_the_oracle_s"
ANY_SCHEDULE = f"{CORE}::test_any_schedule_gives_every_request_its_own_tokens"

TOOLS, CUT_ALIKE = "tests/tools", "test_however_a_text_is_cut_it_is_read_alike"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "half a marker is content",
        "src/tabstop/tools/growing.py",
        "num_held = 0 if self._is_ended else",
        "num_held = 0 if True else",
        (f"{TOOLS}/test_formats.py::{CUT_ALIKE}",),
    ),
    Mutant(
        "half a marker is none",
        "src/tabstop/tools/growing.py",
        "if self._is_ended or not any(marker != left",
        "if True or not any(marker != left",
        (f"{TOOLS}/test_formats.py::{CUT_ALIKE}",),
    ),
    Mutant(
        "functions that nobody offered",
        "src/tabstop/tools/reader.py",
        "        if name not in self._functions:\n            raise Malformed\n",
        "        if name not in self._functions:\n            return OBJECT\n",
        (f"{TOOLS}/test_formats.py::test_what_is_no_call_is_content",),
    ),
    Mutant(
        "arguments in the types that models write",
        "src/tabstop/tools/json_stream.py",
        "    elif not expected.allows(kind):\n",
        "    elif False:\n",
        (f"{TOOLS}/test_expected.py::test_streams_in_the_same_types",),
    ),
    Mutant(
        "broken calls are not taken back",
        "src/tabstop/tools/reader.py",
        "            self._pieces.append(CallPiece(self._num_begun - 1, has_failed=True))\n",
        "",
        (f"{TOOLS}/test_formats.py::test_a_call_that_breaks_is_taken_back_and_is_content",),
    ),
    Mutant(
        "control tokens of a grammar by their letters",
        "src/tabstop/tools/constraint.py",
        "for marker in form.markers if marker in control}",
        "for marker in form.markers if not marker}",
        (f"{TOOLS}/test_constraint.py::test_markers_are_control_tokens_where_the_vocabulary_has_them",),
    ),
    Mutant(
        "markers that are control tokens are lost",
        "src/tabstop/parts.py",
        "self.control_bytes = {**tokenizer.spellings_of(form.markers), **self.control_bytes}",
        "pass",
        ("tests/api/test_tools.py::test_markers_that_are_control_tokens_are_seen_and_not_shown",),
    ),
    Mutant(
        "tools spell control tokens",
        "src/tabstop/text/chat.py",
        "tools = marked(conversation.tools, tokenizer, mark)",
        "tools = conversation.tools",
        (f"{TOOLS}/test_replay.py::test_tools_reach_the_template_and_spell_no_control_tokens",),
    ),
    Mutant(
        "offset of weights forgotten",
        "src/tabstop/kernels/cpu/matrix.h",
        "constexpr int32_t INITIAL = (MINIMA ? 0 :",
        "constexpr int32_t INITIAL = (true ? 0 :",
        ("tests/quant/test_tiles.py::test_products_of_random_shapes_equal_the_twin_s",),
    ),
    Mutant(
        "values behind a row's end",
        "src/tabstop/kernels/cpu/attention.h",
        "if (num_own < LANES) {",
        "if (num_own < 0) {",
        ("tests/attention/test_cpu.py::test_a_row_does_not_depend_on_its_batch_nor_on_threads",),
    ),
    Mutant(
        "spans merged without their largest scores",
        "src/tabstop/kernels/cpu/attention.h",
        "float most = std::max(whole.most[q], part.most[q]);",
        "float most = part.most[q];",
        ("tests/attention/test_cpu.py::test_steps_of_any_lengths_equal_the_reference",),
    ),
    Mutant(
        "window forgotten in the list of operations",
        "src/tabstop/models/compiled.py",
        '"window": layer.window or 0}',
        '"window": 0}',
        ("tests/models/test_compiled.py::test_a_step_in_one_call_equals_its_layers",),
    ),
    Mutant(
        "library known without the processor",
        "src/tabstop/kernels/cpu/build.py",
        "platform.machine(), cpu_flags()):",
        "platform.machine()):",
        ("tests/kernels/test_cpu_build.py::test_it_is_compiled_once_and_known_by_what_it_is_made_of",),
    ),
    Mutant(
        "slot off by one",
        "src/tabstop/worker/batch.py",
        "kv_slots = blocks * self.block_size + positions % self.block_size",
        "kv_slots = blocks * self.block_size + (positions + 1) % self.block_size",
        ("tests/worker/test_batch.py::test_batch_equals_the_plain_loop",),
    ),
    Mutant(
        "key without parent",
        "src/tabstop/cache/blocks.py",
        "hashlib.blake2b(parent + ids, digest_size=16)",
        "hashlib.blake2b(ids, digest_size=16)",
        (f"{BLOCKS}::test_equal_ids_behind_other_histories_are_other_content",),
    ),
    Mutant(
        "scope left out",
        "src/tabstop/cache/blocks.py",
        "hashlib.blake2b(scope.encode(), digest_size=16)",
        "hashlib.blake2b(b'', digest_size=16)",
        (f"{CORE}::test_scopes_never_share", f"{BLOCKS}::test_scopes_have_other_roots"),
    ),
    Mutant(
        "no copy on share",
        "src/tabstop/engine/scheduler.py",
        "plan.copies.append(Copy(match.partial.index, target.index, match.num_partial))",
        "pass",
        (ANY_SCHEDULE,),
    ),
    Mutant(
        "block reused in flight",
        "src/tabstop/engine/scheduler.py",
        "            self.pool.hold(match.partial)\n            flight.holds.append(match.partial)\n",
        "",
        (ANY_SCHEDULE,),
    ),
    Mutant(
        "seed ignoring position",
        "src/tabstop/sampling/random.py",
        "_mix(state ^ (position + _GOLDEN))",
        "_mix(state ^ (position * np.uint64(0) + _GOLDEN))",
        ("tests/sampling/test_sampler.py",),
    ),
    Mutant(
        "output forgotten by a preemption",
        "src/tabstop/engine/request.py",
        "history = self.tokens[:] if",
        "history = self.tokens[: self.num_prompt_tokens] if",
        ("tests/engine/test_pairs.py",),
    ),
    Mutant(
        "drawn token not remembered for penalties",
        "src/tabstop/sampling/sampler.py",
        "        self._history.remember(slots, positions, tokens)\n",
        "",
        ("tests/sampling/test_sampler.py::test_what_was_drawn_counts_in_the_next_step_wherever_it_was_drawn",),
    ),
    Mutant(
        "stop missed across tokens",
        "src/tabstop/text/detokenizer.py",
        "self._stop_strings.feed(self._state, text)",
        "self._stop_strings.feed(0, text)",
        ("tests/text/test_detokenizer.py::test_stop_strings_end_the_text_whatever_the_cuts",),
    ),
    Mutant(
        "middles of control tokens go through templates",
        "src/tabstop/text/tokenizer.py",
        "and text in self._control_middles",
        "and False",
        ("tests/text/test_templates.py::test_no_token_can_be_written_anywhere",),
    ),
    Mutant(
        "keys of tools are not marked",
        "src/tabstop/text/marks.py",
        "key if key in KEYS else",
        "key if True else",
        ("tests/text/test_templates.py::test_no_token_can_be_written_anywhere",),
    ),
    Mutant(
        "loops of templates do not look at the clock",
        "src/tabstop/text/sandbox.py",
        "        loop.body.insert(0, ",
        "        [].insert(0, ",
        ("tests/text/test_sandbox.py::test_endless_templates_are_cut[loops over a list]",),
    ),
    Mutant(
        "an end tag in two pieces is lost",
        "src/tabstop/text/reasoning.py",
        "if held.endswith(self._end[:length])), 0)",
        "if False), 0)",
        ("tests/text/test_reasoning.py::test_every_cut_gives_the_whole",),
    ),
    Mutant(
        "grammars begin with the reasoning",
        "src/tabstop/grammar/__init__.py",
        'if "thinking" in values:',
        "if False:",
        ("tests/grammar/test_thinking.py",),
    ),
    Mutant(
        "end token list ignored",
        "src/tabstop/checkpoint.py",
        "ids += value if isinstance(value, list)",
        "ids += value[:1] if isinstance(value, list)",
        ("tests/test_checkpoint.py",),
    ),
    Mutant(
        "abort leak",
        "src/tabstop/engine/scheduler.py",
        "        if request.slot >= 0:\n            self._leave(request)",
        "        if request.slot >= 0 and delta.finish is not FinishReason.ABORT:\n            self._leave(request)",
        (f"{CORE}::test_a_dead_front_end_frees_everything",),
    ),
    Mutant(
        "ledger drift",
        "src/tabstop/cache/blocks.py",
        "        self.num_held -= block.is_only_held\n",
        "",
        (f"{BLOCKS}::test_held_blocks_outlive_their_owner",),
    ),
    Mutant(
        "wrong RoPE base",
        "src/tabstop/layers/rope.py",
        "torch.pow(config.theta, exponents)",
        "torch.pow(10000.0, exponents)",
        ("tests/models/test_logits.py::test_whole_chunked_and_batched_logits_equal_the_oracle",),
    ),
    Mutant(
        "GGUF q/k not unpermuted",
        "src/tabstop/models/gguf_source.py",
        "order, rows = row_order(self._header, read.name), read.slices[0]",
        "order, rows = None, read.slices[0]",
        ("tests/models/test_gguf.py::test_rotary_rows_and_biases_come_in_the_hub_s_order",),
    ),
    Mutant(
        "window one too wide",
        "src/tabstop/attention/reference.py",
        "seen &= places > queries - window",
        "seen &= places >= queries - window",
        (f"{FAMILIES}[mistral-window]",),
    ),
    Mutant(
        "k rows in another order than q's",
        "src/tabstop/layers/projections.py",
        "orders = (self.order, self.order, None)",
        "orders = (self.order, None, None)",
        (f"{FAMILIES}[codegen]",),
    ),
    Mutant(
        "unturned values scaled",
        "src/tabstop/layers/rope.py",
        "functional.pad(turned, (0, num_unturned), value=1.0)",
        "functional.pad(turned, (0, num_unturned), value=magnitude(config))",
        (f"{FAMILIES}[phi4-partial]",),
    ),
    Mutant(
        "short divisors for long texts",
        "src/tabstop/models/rope.py",
        "Divisors(long if length > context else short,",
        "Divisors(short,",
        ("tests/models/test_families.py::test_longrope_takes_the_divisors_of_the_longest_text",),
    ),
    Mutant(
        "defaults of published configs forgotten",
        "src/tabstop/models/spelling.py",
        "return {**self.defaults, **config, **renamed}",
        "return {**config, **renamed}",
        ("tests/models/test_spelling.py::test_missing_keys_mean_what_the_reference_takes",),
    ),
)


def plant(tree: Path, mutant: Mutant) -> None:
    """Changes the file. Raises BadMutant unless the old text is there exactly once."""
    path = tree / mutant.file
    if not path.is_file():
        raise BadMutant(f"{mutant.name}: there is no {mutant.file}")
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise BadMutant(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(text.replace(mutant.old, mutant.new))


def copy_tree(source: Path, target: Path) -> None:
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, target / name)


def run_tests(tree: Path, tests: Sequence[str]) -> int:
    """pytest's exit code for the named tests of a tree, with that tree's package and no other. Stops at a failure."""
    environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{tree}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    if (tree / "tests/conftest.py").exists():
        command.append("--hypothesis-profile=mutants")  # the first failure will do
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run(command, cwd=tree, env=environment, timeout=PATIENCE_SECONDS, **quiet).returncode
    except subprocess.TimeoutExpired:
        return FAILED


def check_tests(source: Path, tests: Iterable[str]) -> None:
    """Raises BadMutant unless the tests pass on the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="tabstop-mutants-") as folder:
        copy_tree(source, Path(folder))
        code = run_tests(Path(folder), list(tests))
    if code != PASSED:
        raise BadMutant(f"the tests do not pass without a fault (pytest says {code})")


def is_killed(source: Path, mutant: Mutant) -> bool:
    """Whether a test notices the fault. Raises BadMutant when the tests could not run with it."""
    with tempfile.TemporaryDirectory(prefix="tabstop-mutants-") as folder:
        copy_tree(source, Path(folder))
        plant(Path(folder), mutant)
        code = run_tests(Path(folder), mutant.tests)
    if code not in (PASSED, FAILED):
        raise BadMutant(f"{mutant.name}: the tests could not run with it (pytest says {code})")
    return code == FAILED


def main(mutants: Sequence[Mutant] = MUTANTS, source: Path = ROOT) -> int:
    """Runs all of them and reports. 0: all killed · 1: one survived · 2: the table does not fit the tree."""
    num_survivors = 0
    try:
        check_tests(source, sorted({test for mutant in mutants for test in mutant.tests}))
        for mutant in mutants:
            start = time.monotonic()
            killed = is_killed(source, mutant)
            num_survivors += not killed
            print(
                f"{'killed' if killed else 'SURVIVED':8} {time.monotonic() - start:5.1f} s  {mutant.name}", flush=True
            )
    except BadMutant as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(mutants) - num_survivors} of {len(mutants)} faults killed")
    return 1 if num_survivors else 0


if __name__ == "__main__":
    sys.exit(main())
