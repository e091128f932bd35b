"""The catalogue names what exists, and the page is made of it."""

from __future__ import annotations

from pathlib import Path

from tabstop.models import FAMILIES
from tabstop.models.catalogue import CATALOGUE, page
from tabstop.models.gguf_families import GGUF_FAMILIES
from tests.models.families import VARIANTS
from tests.models.test_family_files import FORMS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_architecture_has_one_row_and_every_row_is_registered() -> None:
    listed = [name for row in CATALOGUE for name in row.architectures]
    assert sorted(listed) == sorted(FAMILIES)


def test_every_gguf_architecture_is_named_and_verified() -> None:
    forms = " ".join(form for row in CATALOGUE for form in row.forms)
    assert all(name in forms for name in GGUF_FAMILIES)
    written = {form.architecture for _, form in FORMS.values()}
    assert written == set(GGUF_FAMILIES)


def test_every_architecture_is_compared_with_the_oracle() -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    compared = {
        MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(each.name))].__name__ for each in VARIANTS.values()
    }
    assert compared | {"ChatGLMModel"} == set(FAMILIES)  # its code is not in transformers: tests/models/test_chatglm.py


def test_the_page_is_fresh() -> None:
    """If not: python -c 'from tabstop.models.catalogue import page; print(page(), end="")' > docs/models.md"""
    assert PAGE.read_text(encoding="utf-8") == page()
