"""What each family of code models was trained to read when a hole is to be filled: markers, orders, stops. Only data.

The spellings are those of the families' own tokenizers and of their reference code. A new family is one entry of
FAMILIES; which of them a vocabulary belongs to is text/fim_detection.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Order = tuple[str, ...]
"""Parts of a prompt in their order: `prefix`, `suffix`, `middle` are markers, `P` and `S` the user's texts."""

PSM: Order = ("prefix", "P", "suffix", "S", "middle")
SPM: Order = ("suffix", "S", "prefix", "P", "middle")
JOINED_SPM: Order = ("prefix", "suffix", "S", "middle", "P")  # suffix first as BigCode and CodeLlama trained it
OPEN_SPM: Order = ("suffix", "S", "prefix", "P")  # the prefix is simply continued


@dataclass(frozen=True, slots=True)
class Family:
    """One way to lay out a hole. `orders`: "psm" or "spm" → parts; the first is what the family's authors use."""

    name: str
    prefix: str
    suffix: str
    middle: str  # "": not sent
    orders: dict[str, Order] = field(default_factory=lambda: {"psm": PSM})
    stops: tuple[str, ...] = ()  # tokens that end an answer, beside the three markers and the checkpoint's end tokens
    stop_strings: tuple[str, ...] = ()  # what the family writes as plain text when it is done
    frame: str = "comment"  # how files of the repository are shown (text/fim_frames.py)
    empty_suffix: str = "\n"  # stands for a suffix that is empty

    def marker(self, part: str) -> str:
        """The spelling of prefix, suffix or middle."""
        return {"prefix": self.prefix, "suffix": self.suffix, "middle": self.middle}[part]

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Every token after which nothing belongs to the hole."""
        return (*(marker for marker in (self.prefix, self.suffix, self.middle) if marker), *self.stops)


_PIPES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_PLAIN = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
_HYPHENS = ("<fim-prefix>", "<fim-suffix>", "<fim-middle>")
_CODE = ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")
_BOTH = {"psm": PSM, "spm": JOINED_SPM}
_BIGCODE_STOPS = ("<|endoftext|>", "<fim_pad>", "<filename>", "<reponame>", "<file_sep>", "<repo_name>")
_QWEN_STOPS = (
    *("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>"),
    "<|cursor|>",
)

FAMILIES: tuple[Family, ...] = (
    Family("qwen", *_PIPES, stops=_QWEN_STOPS, stop_strings=("<|cursor|>",), frame="qwen"),
    Family("codegemma", *_PIPES, stops=("<|file_separator|>", "<eos>", "<end_of_turn>"), frame="codegemma"),
    Family("granite", *_PIPES, stops=("<|end_of_text|>", "<|fim_pad|>"), frame="comment"),
    Family("pipes", *_PIPES, stops=("<|endoftext|>", "<|end_of_text|>", "<|fim_pad|>")),
    Family("starcoder2", *_PLAIN, orders=_BOTH, stops=_BIGCODE_STOPS, frame="starcoder2"),
    Family("starcoder", *_PLAIN, orders=_BOTH, stops=_BIGCODE_STOPS, frame="starcoder"),
    Family("granite-code", *_PLAIN, orders=_BOTH, stops=_BIGCODE_STOPS),
    Family("stablecode", *_PLAIN, stops=_BIGCODE_STOPS),
    Family("mellum", *_PLAIN, orders={"spm": SPM}, stops=_BIGCODE_STOPS, frame="mellum"),
    Family("santacoder", *_HYPHENS, orders=_BOTH, stops=("<|endoftext|>", "<fim-pad>", "<|filename|>")),
    Family(
        "deepseek",
        *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        stops=("<｜end▁of▁sentence｜>", "<|EOT|>"),
    ),
    Family("codellama", "▁<PRE>", "▁<SUF>", "▁<MID>", orders=_BOTH, stops=("▁<EOT>", "</s>"), empty_suffix=""),
    Family(
        "mistral",
        *("[PREFIX]", "[SUFFIX]", ""),
        orders={"spm": OPEN_SPM},
        stops=("</s>", "[MIDDLE]"),
        frame="mistral",
        empty_suffix="",
    ),
    Family(
        "seed-coder",
        *("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),
        orders={"spm": SPM, "psm": PSM},
        stops=("<[end▁of▁sentence]>", "<[PAD▁TOKEN]>", "<[SEP▁TOKEN]>"),
    ),
    Family("codegeex", *_CODE, orders={"spm": SPM}, stops=("<|endoftext|>", "<|user|>"), frame="codegeex"),
    Family("glm", *_CODE, stops=("<|endoftext|>", "<|user|>")),
    Family("falcon-h1", "<|prefix|>", "<|suffix|>", "<|middle|>", stops=("<|end_of_text|>", "<|endoftext|>")),
)

BY_NAME = {family.name: family for family in FAMILIES}
