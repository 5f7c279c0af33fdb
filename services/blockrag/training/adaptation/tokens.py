"""Link and sink tokens: trainable tokens that end and open each passage's block.

They are ordinary entries of the vocabulary, written by the template into every passage's block. So a cached block
holds their keys and values like any other slot's, and everything that serves or verifies a bundle stays as it is.

Links give a block a place to gather what the question may ask of it (KVLink, arXiv 2502.16002, section 3.2, five per
document); sinks take up the attention that the first tokens of a text attract (arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from blockrag.errors import BundleError
from blockrag.modeling.template import PromptTemplate


def block_tokens(links: int, sinks: int) -> list[str]:
    """Texts of the tokens, sinks first."""
    return [f"<|sink_{number}|>" for number in range(sinks)] + [f"<|link_{number}|>" for number in range(links)]


def with_block_tokens(template: PromptTemplate, links: int, sinks: int) -> PromptTemplate:
    """``template`` with the tokens around each passage. Raises BundleError when it has such tokens already."""
    texts = block_tokens(links, sinks)
    present = [text for text in texts if text in template.passage]
    if present:
        raise BundleError(f"the template's passage holds {', '.join(present)} already: it was adapted with them")
    opening, closing = "".join(texts[:sinks]), "".join(texts[sinks:])
    return replace(template, passage=f"{opening}{template.passage}{closing}")


def add_block_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, links: int, sinks: int, seed: int
) -> list[int]:
    """Add the tokens to tokenizer and model; gives their ids.

    Their embeddings start at the vocabulary's mean with a tenth of its spread as noise: near what the layers know,
    and not all alike. Rows that the model has to spare are used before its vocabulary grows.
    """
    texts = block_tokens(links, sinks)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
    ids = [int(tokenizer.convert_tokens_to_ids(text)) for text in texts]
    if not ids:
        return ids
    known = len(tokenizer) - len(ids)
    if max(ids) >= int(model.config.vocab_size):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(head.weight): head.weight for head in heads if head is not None}  # one where they are tied
    with torch.no_grad():
        for weight in weights.values():
            rows = weight[:known].float()
            noise = torch.randn(len(ids), weight.shape[1], generator=generator)
            weight[ids] = (rows.mean(0) + 0.1 * rows.std(0) * noise).to(weight.dtype)
    return ids
