"""How each family shows other files of a repository around a hole. Pure: names and texts in, parts of a prompt out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

DEFAULT_REPOSITORY = "repository"
DEFAULT_PATH = "file"

COMMENTS = {
    **dict.fromkeys(("python", "ruby", "shellscript", "bash", "sh", "yaml", "toml", "perl", "r", "make"), "# "),
    **dict.fromkeys(("lua", "sql", "haskell", "ada", "elm"), "-- "),
    **dict.fromkeys(("lisp", "clojure", "scheme"), "; "),
    **dict.fromkeys(("latex", "erlang", "matlab"), "% "),
}
"""Language → what opens a comment line; `//` for those that are not here."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the repository, as the client shows it."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known around a hole, beside its own file. Later files are nearer to the cursor."""

    files: Sequence[SourceFile] = ()
    repo_name: str = ""
    path: str = ""  # of the file with the hole
    language: str = ""

    def __bool__(self) -> bool:
        return bool(self.files or self.repo_name or self.path or self.language)


@dataclass(frozen=True, slots=True)
class Token:
    """A control token by its spelling."""

    spelling: str


Part = Token | str
"""A control token, or text that never becomes one."""

Has = Callable[[str], bool]
"""Whether the vocabulary has a control token."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Parts before the hole's own layout, parts and a text that open its prefix, and parts after the layout."""

    before: tuple[Part, ...] = ()
    opening: tuple[Part, ...] = ()
    head: str = ""  # encoded together with the prefix
    after: tuple[Part, ...] = ()


def _qwen(around: Surroundings, has: Has) -> Frame:
    if not around:
        return Frame()
    parts: list[Part] = [Token("<|repo_name|>"), f"{around.repo_name or DEFAULT_REPOSITORY}\n"]
    for file in around.files:
        parts += [Token("<|file_sep|>"), f"{file.path}\n{_ended(file.text)}"]
    return Frame((*parts, Token("<|file_sep|>"), f"{around.path or DEFAULT_PATH}\n"))


def _codegemma(around: Surroundings, has: Has) -> Frame:
    parts: list[Part] = []
    for file in around.files:
        parts += [f"{file.path}\n{_ended(file.text)}", Token("<|file_separator|>")]
    return Frame((*parts, f"{around.path}\n") if around.path else tuple(parts))


def _starcoder2(around: Surroundings, has: Has) -> Frame:
    """Also CodeQwen's, which spells the repository's token as StarCoder did."""
    if not (around.files or around.repo_name or around.path):
        return Frame()
    repository = next((name for name in ("<repo_name>", "<reponame>") if has(name)), "")
    parts: list[Part] = [Token(repository), around.repo_name or DEFAULT_REPOSITORY] if repository else []
    for file in around.files:
        parts += [Token("<file_sep>"), f"{file.path}\n{file.text}"]
    return Frame((*parts, Token("<file_sep>")), head=f"{around.path or DEFAULT_PATH}\n")


def _starcoder(around: Surroundings, has: Has) -> Frame:
    """Tags open a document, and documents were cut into holes with them: they belong to the prefix."""
    given = (("<reponame>", around.repo_name), ("<filename>", around.path))
    tags = [(tag, name) for tag, name in given if name and has(tag)]
    parts: list[Part] = []
    for tag, name in tags:
        parts += [Token(tag), name]
    last = f"{parts.pop()}\n" if parts else ""  # the text behind it was encoded with it
    return Frame(opening=tuple(parts), head=last + _comments(around.files, around.language))


def _mellum(around: Surroundings, has: Has) -> Frame:
    parts: list[Part] = []
    for file in around.files:
        parts += [Token("<filename>"), f"{file.path}\n{_ended(file.text)}"]
    return Frame((*parts, Token("<filename>"), f"{around.path or DEFAULT_PATH}\n") if around else ())


def _mistral(around: Surroundings, has: Has) -> Frame:
    shown = "".join(f"+++++ {file.path}\n{_ended(file.text)}\n" for file in around.files)
    return Frame(head=f"{shown}+++++ {around.path or DEFAULT_PATH}\n" if around.files else "")


def _codegeex(around: Surroundings, has: Has) -> Frame:
    shown = "".join(f"###REFERENCE:\n###PATH:{file.path}\n{_ended(file.text)}" for file in around.files)
    opening = f"\n{shown}###PATH:{around.path}\n###LANGUAGE:{around.language}\n###MODE:BLOCK\n"
    return Frame((Token("<|user|>"), opening), after=(Token("<|assistant|>"), "\n"))


def _comment(around: Surroundings, has: Has) -> Frame:
    """DeepSeek's documented form, `#path` and the file, for every family without a form of its own."""
    shown = _comments(around.files, around.language)
    return Frame(head=f"{shown}{_opener(around.language)}{around.path}\n" if around.path and shown else shown)


FRAMES: dict[str, Callable[[Surroundings, Has], Frame]] = {
    "comment": _comment,
    "qwen": _qwen,
    "codegemma": _codegemma,
    "starcoder": _starcoder,
    "starcoder2": _starcoder2,
    "mellum": _mellum,
    "mistral": _mistral,
    "codegeex": _codegeex,
}
"""Family.frame → its form."""


def _comments(files: Sequence[SourceFile], language: str) -> str:
    return "".join(f"{_opener(language)}{file.path}\n{_ended(file.text)}" for file in files)


def _opener(language: str) -> str:
    return COMMENTS.get(language.lower(), "// ") if language else "#"


def _ended(text: str) -> str:
    """The text with a line end at its end."""
    return text if text.endswith("\n") or not text else text + "\n"
