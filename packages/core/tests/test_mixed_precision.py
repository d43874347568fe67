"""Memories and prototypes are often kept in another precision than the batch, under autocast always."""

import pytest
import torch

from cl_core import functional as F
from cl_core.memory import FeatureQueue

ROWS, HELD, WIDTH = 6, 9, 8
LABELS, HELD_LABELS = torch.arange(ROWS) // 2, torch.arange(HELD) // 3
ASSIGNED = torch.arange(ROWS) % HELD

LOSSES = {
    "info_nce": lambda z, other, held: F.info_nce_loss(z, other, held),
    "info_nce with the batch": lambda z, other, held: F.info_nce_loss(z, other, held, in_batch=True),
    "info_nce tiled": lambda z, other, held: F.info_nce_loss(z, other, held, impl="tiled"),
    "dcl": lambda z, other, held: F.dcl_loss(z, other, negatives=held),
    "dclw": lambda z, other, held: F.dclw_loss(z, other, negatives=held),
    "amcl": lambda z, other, held: F.amcl_loss(z, other, held, heads=2, temperature=0.5),
    "amcl lse": lambda z, other, held: F.amcl_loss(z, other, held, heads=2, temperature=0.5, pooling="lse"),
    "ressl": lambda z, other, held: F.ressl_loss(z, other, held),
    "sup_con": lambda z, _, held: F.sup_con_loss(z, LABELS, ref=held, ref_labels=HELD_LABELS),
    "sup_con in": lambda z, _, held: F.sup_con_loss(z, LABELS, form="in", ref=held, ref_labels=HELD_LABELS),
    "sup_con pair": lambda z, _, held: F.sup_con_loss(
        z, LABELS, form="pair", ref=held, ref_labels=HELD_LABELS
    ),
    "triplet": lambda z, _, held: F.triplet_margin_loss(z, LABELS, ref=held, ref_labels=HELD_LABELS),
    "circle": lambda z, _, held: F.circle_loss(z, LABELS, ref=held, ref_labels=HELD_LABELS),
    "swav": lambda z, other, held: F.swav_loss(z, other, queue=[held, held]),
    "prototypes": lambda z, _, held: F.prototype_nce_loss(z, held, ASSIGNED),
}


def rows(count, *, seed, dtype):
    z = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("batch", "memory"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_a_memory_is_compared_in_the_precision_of_the_batch(name, batch, memory):
    computed = torch.promote_types(batch, torch.float32)
    z, other = (rows(ROWS, seed=seed, dtype=batch) for seed in (0, 1))
    held = rows(HELD, seed=2, dtype=memory)
    results = []
    for given in ((z, other, held), (z.to(computed), other.to(computed), held.to(computed))):
        leaf = given[0].clone().requires_grad_()
        loss = LOSSES[name](leaf, *given[1:])
        assert loss.dtype == computed
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (value, gradient), (wanted, of_wanted) = results
    assert gradient.dtype == batch
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, of_wanted.to(batch))


def test_prototypes_in_float32_get_their_gradient_beside_half_rows():
    prototypes = rows(HELD, seed=2, dtype=torch.float32).requires_grad_()
    loss = F.prototype_nce_loss(rows(ROWS, seed=0, dtype=torch.bfloat16), prototypes, ASSIGNED)
    assert torch.autograd.grad(loss, prototypes)[0].dtype == torch.float32


def test_moco_under_autocast():
    """The recipe of the README: queries and keys are half there, the queue is not."""
    queue, layer = FeatureQueue(16, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    queue.enqueue(rows(16, seed=3, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        query, key = (
            layer(rows(ROWS, seed=0, dtype=torch.float32)),
            layer(rows(ROWS, seed=1, dtype=torch.float32)),
        )
        assert query.dtype == torch.bfloat16
        loss = F.info_nce_loss(query, key.detach(), queue.embeddings)
        queue.enqueue(key.detach())
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
