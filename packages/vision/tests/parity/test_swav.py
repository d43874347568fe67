"""SwAV's queue, optimiser and schedule against the stored results of the published code."""

import pytest
import torch
from torch import nn

from cl_core.losses import PrototypeNCELoss, SwAVLoss
from cl_core.method import Progress
from cl_core.projectors import Projector
from cl_core.testing import parity
from cl_core.training import Optimization
from cl_vision.data import Views
from cl_vision.encoders import Encoder
from cl_vision.methods import DeepClusterV2, SwAV

TOLERANCE = {
    torch.float64: parity.Tolerance(relative=1e-9, absolute=1e-12),
    torch.float32: parity.Tolerance(relative=2e-5, absolute=1e-6),
}

SINGLE = parity.Tolerance(relative=2e-5, absolute=1e-6)  # of what was stored in single precision


class Given(Encoder):
    """Takes embeddings for images."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, images):
        return images.flatten(1)


class AsItIs(Projector):
    def __init__(self, dim):
        super().__init__()
        self.in_dim = self.out_dim = dim

    def forward(self, features):
        return features


def run_queue_protocol(arrays):
    embeddings, prototypes = arrays.tensor("embeddings"), arrays.tensor("prototypes")
    names = ("temperature", "epsilon", "iterations")
    loss = SwAVLoss(**{name: arrays.parameter(name) for name in names})
    width, size, batch = prototypes.shape[1], arrays.parameter("queue_length"), arrays.parameter("batch")
    method = SwAV(Given(width), loss, AsItIs(width), len(prototypes), queue_size=size, queue_from_epoch=0).to(
        arrays.dtype
    )
    method.prototypes = nn.Parameter(prototypes)
    losses, codes, queues, in_use = [], [], [], []
    for step in embeddings:
        crops = tuple(crop[:, :, None, None] for crop in step.chunk(2))
        earlier = method._queue_scores()
        in_use.append(earlier is not None)
        codes.append(codes_of(loss, method, crops, earlier))
        losses.append(method(Views(crops, torch.zeros(batch), torch.arange(batch))).detach())
        queues.append(torch.stack([newest_first(queue, batch) for queue in method.queues]))
    arrays.compare("losses", torch.stack(losses))
    arrays.compare("codes", torch.stack(codes), tolerance=parity.Tolerance(relative=1e-4, absolute=1e-6))
    arrays.compare("queue_after", torch.stack(queues))
    stored = arrays.tensor("queue_in_use").bool().tolist()
    assert in_use == stored


def codes_of(loss, method, crops, earlier):
    from cl_core.functional import sinkhorn

    options = {"epsilon": loss.epsilon, "iterations": loss.iterations}
    scores = [method.scores(crop.flatten(1)).detach() for crop in crops]
    together = [torch.cat(pair) for pair in zip(earlier, scores, strict=True)] if earlier else scores
    return torch.stack([sinkhorn(s, **options)[-len(crops[0]) :] for s in together])


def newest_first(queue, batch):
    """The published order: the newest batch on top, zeros below until the queue is full."""
    rows = queue.embeddings
    rows = rows.roll(-queue.pointer, 0) if queue.filled == queue.size else rows
    batches = rows.view(-1, batch, rows.shape[1]).flip(0).flatten(0, 1)
    return torch.cat([batches, rows.new_zeros(queue.size - len(batches), rows.shape[1])])


def run_larc_sgd(arrays):
    parameter = nn.Parameter(arrays.tensor("param0")[:, None])  # a matrix, which is what decays
    names = {"lr": "lr", "weight_decay": "weight_decay", "momentum": "momentum"}
    options = {ours: arrays.parameter(name) for ours, name in names.items()}
    optimization = Optimization(
        optimizer="lars", trust_coefficient=arrays.parameter("trust_coefficient"), **options
    )

    class One(SwAV):
        def __init__(self):
            nn.Module.__init__(self)
            self.weight = parameter

    (optimizer,) = optimization.build(One()).values()
    assert optimizer.param_groups[0]["eps"] == arrays.parameter("eps")
    after = []
    for gradient in arrays.tensor("grads"):
        parameter.grad = gradient[:, None].clone()
        optimizer.step()
        after.append(parameter.detach().clone()[:, 0])
    arrays.compare("params_after", torch.stack(after))
    arrays.waive("adaptive_ratio", reason="inside the optimiser; the parameters show it")


def run_lr_schedule(arrays):
    epochs, per_epoch = arrays.parameter("epochs"), arrays.parameter("iters_per_epoch")
    base = arrays.parameter("base_lr")
    optimization = Optimization(
        lr=base,
        final_lr=arrays.parameter("final_lr"),
        warmup_lr=arrays.parameter("start_warmup"),
        warmup_epochs=arrays.parameter("warmup_epochs"),
    )
    steps = epochs * per_epoch
    rates = [base * optimization.factor(Progress(s, steps, s // per_epoch, epochs)) for s in range(steps)]
    arrays.compare("lr", torch.tensor(rates, dtype=torch.float64))


def run_deepcluster_v2(arrays):
    memory, index = arrays.tensor("memory"), arrays.tensor("memory_index")
    counts = arrays.tensor("n_prototypes").tolist()
    starts = iter([index[arrays.tensor(f"init_rows_{head}")] for head in range(len(counts))])
    loss = PrototypeNCELoss(arrays.parameter("temperature"))

    class Started(DeepClusterV2):
        def _start(self, rows, clusters):
            return next(starts)

    width = memory.shape[2]
    iterations = arrays.parameter("kmeans_iters")
    method = Started(Given(width), loss, AsItIs(width), counts, kmeans_iterations=iterations).to(arrays.dtype)
    nothing = torch.zeros(len(index))
    method.prepare([Views(tuple(memory[:, :, :, None, None]), nothing, index)])
    for head, prototypes in enumerate(method.heads):
        arrays.compare(f"centroids_{head}", prototypes, tolerance=SINGLE)
    assert torch.equal(method.assignments, arrays.tensor("assignments"))
    batch = arrays.tensor("batch_index")
    crops = arrays.tensor("embeddings")[:, :, None, None].chunk(arrays.parameter("n_crops"))
    arrays.compare("loss", method(Views(crops, nothing[: len(batch)], batch)), tolerance=SINGLE)
    arrays.waive(
        "grad_embeddings", reason="cl-core compares it; a method brings its rows to unit length first"
    )


KINDS = {name.removeprefix("run_"): run for name, run in list(globals().items()) if name.startswith("run_")}
NOT_HERE = ("sinkhorn", "loss")  # kinds that belong to cl-core, in a folder that holds all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [c for c in parity.cases("swav", beside=__file__) if not c.kind.startswith(NOT_HERE)],
    ids=str,
)
def test_matches_official(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
