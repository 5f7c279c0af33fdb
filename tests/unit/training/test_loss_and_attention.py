import pytest
import torch
from torch.nn import functional as F

from blockrag.training.adaptation import visibility as attention
from blockrag.training.refrag.refrag_reader import linear_cross_entropy
from tests.models import TINY_VOCAB, make_tiny_model


def test_chunked_cross_entropy_has_the_loss_and_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(1300, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets, weights = torch.randint(0, 40, (1300,)), torch.rand(1300)
    total, losses, divergences = linear_cross_entropy(hidden, head, targets, weights)
    assert not divergences.any()
    (3 * total).backward()
    gradients = hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gradients, (hidden.grad, head.grad), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tile", [256, 5])
def test_training_attention_agrees_with_the_stock_one(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TILE", tile)
    torch.manual_seed(0)
    model = make_tiny_model()
    ids = torch.randint(0, TINY_VOCAB, (2, 12))
    mask = torch.ones(2, 1, 12, 12).tril().bool()
    mask[0, 0, 6:, :3] = False  # a key that one row sees and the other does not
    mask[:, 0, 5:10, :5] = False  # a tile of five has keys that nobody there sees
    found = []
    for name, given in ((None, mask), (attention.TRAINING_ATTENTION, attention.additive_mask(mask, torch.float32))):
        if name:
            model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=given).logits
        logits.square().mean().backward()
        found.append((logits.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
