import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from blockrag.training.attention import additive_mask, register
from blockrag.training.config import ModelShape
from blockrag.training.loss import linear_cross_entropy


def test_chunked_cross_entropy_has_the_loss_and_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(1300, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets, weights = torch.randint(0, 40, (1300,)), torch.rand(1300)
    total, losses = linear_cross_entropy(hidden, head, targets, weights)
    (3 * total).backward()
    gradients = hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gradients, (hidden.grad, head.grad), atol=1e-4, rtol=1e-4)


def test_training_attention_agrees_with_the_stock_one() -> None:
    torch.manual_seed(0)
    config = ModelShape(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48).config()
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    mask = torch.ones(2, 1, 12, 12).tril().bool()
    mask[0, 0, 6:, :3] = False
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(register())
        ours = model(input_ids=ids, attention_mask=additive_mask(mask, torch.float32)).logits
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
