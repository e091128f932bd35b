"""What can be served, as rows for people: families, the models they are known by, forms of files, quirks, evidence.

`tabstop models` prints the rows; docs/models.md is made of them. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.models.gguf_families import GGUF_FAMILIES

LOGITS = "float32 logits = transformers', whole, chunked, cached, batched (tests/models/test_families.py)"
FILES = "GGUF of the same weights (tests/models/test_family_files.py)"

VERIFICATION = """\
Tiny random checkpoints of every shape that a family comes in (grouped, single and many key heads, odd head sizes, tied
and untied, every scaling), against transformers on the CPU. Of published weights the default model's were compared."""
OWN_FORM = "Mistral's own (params.json, consolidated*.safetensors, tekken.json)"

INTRODUCTION = """\
# Models

<!-- Made of src/tabstop/models/catalogue.py; a test keeps it fresh and says how. -->

Every family runs through the same kernels: rows of heads are put into one order when they are read, so positions turn
and attention runs alike for all. A family's own norm, activation or order of a block is plain torch, on any device.

All forms are read with bounded memory and strictly: a tensor that is missing, left over, of another shape or type is
one error with its name. Pickle files are never opened, and code in a checkpoint is never run.
"""


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """One family."""

    family: str
    models: str  # by which people know it
    architectures: tuple[str, ...]  # config.json's, as in FAMILIES
    quirks: str
    forms: tuple[str, ...]
    verified_by: str


def _row(family: str, models: str, architectures: str, quirks: str, *more: str) -> CatalogueRow:
    """`architectures`: blank between them; `more`: forms beside safetensors and GGUF."""
    names = tuple(architectures.split())
    found = [name for name, each in GGUF_FAMILIES.items() if each.architecture in names]
    forms = ("safetensors", *([f"GGUF ({', '.join(found)})"] if found else []), *more)
    evidence = [LOGITS, FILES] if "GGUF" in str(forms) else [LOGITS]
    return CatalogueRow(family, models, names, quirks, forms, "; ".join(evidence))


CATALOGUE: tuple[CatalogueRow, ...] = (
    _row(
        "Llama",
        "Code Llama, DeepSeek-Coder 1.x, Granite-code 3B and 8B, Seed-Coder, Mellum, Yi-Coder, OpenCoder, SmolLM",
        "LlamaForCausalLM",
        "RoPE scaling linear, dynamic, yarn, longrope and llama3; dynamic and longrope are fixed at the start, for "
        "--max-model-len; biases of attention and MLP",
    ),
    _row(
        "Qwen2",
        "Qwen2.5-Coder, CodeQwen1.5, Sweep next-edit, Zeta 1",
        "Qwen2ForCausalLM",
        "biases on q, k, v; YaRN stretches max_position_embeddings by its factor; windows are refused",
    ),
    _row("Qwen3", "Qwen3 (dense)", "Qwen3ForCausalLM", "q and k heads are normed, before a plain rotation"),
    _row(
        "Mistral",
        "Codestral 22B, Devstral, Mistral 7B, Ministral",
        "MistralForCausalLM MinistralForCausalLM",
        "a window over the last positions, in all layers or in those that layer_types names; KV memory keeps all",
        "GGUF (llama)",
        OWN_FORM,
    ),
    _row(
        "Ministral 3",
        "Devstral 2, Ministral 3 (text)",
        "Ministral3ForCausalLM",
        "YaRN; queries grow with their position behind the original context, in an operation of its own",
        OWN_FORM,
    ),
    _row(
        "Starcoder2",
        "StarCoder2 3B, 7B, 15B",
        "Starcoder2ForCausalLM",
        "LayerNorm, biases, plain MLP, a window of 4096, of which GGUF files say nothing: there it is not applied",
    ),
    _row(
        "GPTBigCode",
        "SantaCoder (converted), StarCoder, Granite-code 20B and 34B, OctoCoder",
        "GPTBigCodeForCausalLM",
        "one key head, learned positions: their number is a hard limit; LayerNorm, biases",
    ),
    _row(
        "Gemma",
        "CodeGemma 2B, 7B",
        "GemmaForCausalLM",
        "heads of 256 values, norms of 1 + weight (in plain torch), scaled embeddings, gated GELU, tied",
    ),
    _row(
        "Phi",
        "Phi-1, Phi-1.5, Phi-2",
        "PhiForCausalLM",
        "attention and MLP side by side behind one LayerNorm; a part of each head turns; a head with a bias",
    ),
    _row(
        "Phi-3",
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        "Phi3ForCausalLM",
        "q, k, v and gate, up as one matrix each; longrope by --max-model-len; a window; a part of each head turns",
    ),
    _row(
        "StableLm",
        "Stable Code 3B",
        "StableLmForCausalLM",
        "LayerNorm; a quarter of each head turns; norms of q and k are refused",
    ),
    _row(
        "GPT-NeoX",
        "PolyCoder, Pythia",
        "GPTNeoXForCausalLM",
        "branches side by side or in turn; q, k, v packed head by head; the exact GELU, also of GGUF files",
    ),
    _row(
        "CodeGen",
        "CodeGen 350M to 16B",
        "CodeGenForCausalLM",
        "GPT-J's block; neighbours turn; q, v, k packed in four groups of heads; published as pickle files, which "
        "must be converted to safetensors first",
    ),
    _row(
        "Granite",
        "Granite 3.x (dense)",
        "GraniteForCausalLM",
        "multipliers of embeddings, scores, branches and logits",
    ),
    _row(
        "GLM-4",
        "CodeGeeX4, GLM-4 9B, GLM-4-0414",
        "ChatGLMModel GlmForCausalLM Glm4ForCausalLM",
        "neighbours turn in half of each head; gate and up are one matrix; from 0414 on four norms a block",
    ),
)


def page() -> str:
    """docs/models.md."""
    lines = [INTRODUCTION, "| family | models | architectures | forms | quirks |", "|---|---|---|---|---|"]
    for row in CATALOGUE:
        architectures = ", ".join(f"`{name}`" for name in row.architectures)
        lines.append(f"| {row.family} | {row.models} | {architectures} | {', '.join(row.forms)} | {row.quirks} |")
    lines += ["", "## Verified by", "", VERIFICATION]
    for evidence in dict.fromkeys(row.verified_by for row in CATALOGUE):
        families = ", ".join(row.family for row in CATALOGUE if row.verified_by == evidence)
        lines += ["", f"**{families}**: {evidence}."]
    return "\n".join(lines) + "\n"
