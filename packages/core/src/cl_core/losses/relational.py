"""ReSSL: the student's similarities to a queue follow the teacher's."""

from __future__ import annotations

from torch import Tensor

from cl_core import _checks, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import shard
from cl_core.losses._base import QueueLoss
from cl_core.losses._common import check_rows, inverse, reduce


def ressl_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    teacher_temperature: float = 0.04,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Cross entropy between the teacher's and the student's similarities to a queue.

    With unit rows q_i (student), k_i (teacher), n_j (queue),

        l_i = -sum_j p_ij log softmax_j(q_i . n_j / T),    p_ij = softmax_j(k_i . n_j / T_t)

    computed as log-sum-exp_j(q_i . n_j / T) - q_i . m_i / T with the teacher's mean m_i = sum_j p_ij n_j, so that no
    N x K matrix exists.

    Args:
        query: student embeddings, shape (N, D).
        key: teacher embeddings of the other view, shape (N, D); a constant.
        queue: earlier teacher embeddings, shape (K, D), the same on all ranks; a constant.
        teacher_temperature: T_t > 0, usually smaller than T.
        temperature: T > 0 of the student; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the N queries, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes do not fit, an input is empty or not finite, or a temperature is <= 0.

    Cost: O(N K D) time, O((N + K) D) memory beyond a few thousand rows.
    Reference: Zheng et al., "ReSSL: Relational Self-Supervised Learning with Weak Augmentation", NeurIPS 2021,
    arXiv 2107.09282.
    """
    _checks.reduction(reduction)
    _checks.impl(impl)
    check_rows(group, query=query, key=key)
    _checks.same_shape(query=query, key=key)
    _checks.embeddings("queue", queue)
    _checks.alongside(query=query, queue=queue)
    _checks.temperature("temperature", temperature)
    _checks.temperature("teacher_temperature", teacher_temperature)
    student = similarity.scaled_rows(query, scale=inverse(temperature), normalize=normalize)
    teacher = similarity.scaled_rows(key.detach(), scale=1 / teacher_temperature, normalize=normalize)
    columns = similarity.scaled_rows(queue.detach(), normalize=normalize, dtype=student.dtype)
    log_sum = similarity.cross_log_sum_exp(student, columns, impl=impl)
    expected = similarity.row_products(student, similarity.softmax_mean(teacher, columns))
    return reduce(log_sum - expected, reduction, split=shard(query, group))


class ReSSLLoss(QueueLoss):
    """Module form of :func:`ressl_loss`.

    Args:
        temperature: T > 0 of the student.
        teacher_temperature: T_t > 0.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        teacher_temperature: float = 0.04,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _checks.temperature("teacher_temperature", teacher_temperature)
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """Loss of queries (N, D) and keys (N, D) over a queue (K, D)."""
        return ressl_loss(query, key, queue, **self.hyperparameters())
