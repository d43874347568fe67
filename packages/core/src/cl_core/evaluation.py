"""What frozen embeddings are worth: weighted nearest neighbours and a linear probe, both tiled over rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cl_core import _checks, _rows

_TRAIN_TILE = 8192


def knn_scores(
    train: Tensor,
    train_labels: Tensor,
    query: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:
    r"""Votes of the k nearest training rows for each class.

    With cosine similarities s and the k most similar training rows K(i) of query i,

        score_ic = sum_{j in K(i), label_j = c} exp(s_ij / T)  /  sum_{j in K(i)} exp(s_ij / T)

    so that each row of scores sums to one. The division changes no ranking and keeps small T finite.

    Args:
        train: embeddings with known labels, shape (N, D); rows need not have unit length.
        train_labels: integer labels, shape (N,); any values.
        query: embeddings to classify, shape (M, D).
        k: neighbours that vote, >= 1; all N rows vote when k exceeds N.
        temperature: T > 0, dimensionless.
        num_classes: number of classes when labels are known to lie in 0 .. num_classes - 1 (a class without a
            training row then scores 0); None takes the distinct values of ``train_labels``.
        tile: query rows at a time.

    Returns:
        Scores of shape (M, C) and the label of each column, int64 of shape (C,), ascending.

    Raises:
        ValueError: if shapes, devices or dtypes differ, a value is not finite, or a label is out of range.

    Cost: O(M N D) time, O(tile + M C + (M + N) D) memory.
    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    CVPR 2018, arXiv 1805.01978.
    """
    classes, train_index = _check_knn(train, train_labels, query, k, temperature, num_classes, tile)
    scores = query.new_empty(len(query), len(classes), dtype=torch.promote_types(query.dtype, torch.float32))
    with _rows.measuring(query.device):
        train, query = _rows.unit(train), _rows.unit(query)
        for rows in _rows.tiles(len(query), tile):
            scores[rows] = _votes(
                train, train_index, query[rows], min(k, len(train)), temperature, len(classes)
            )
    return scores, classes


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    query: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    tile: int = 1024,
) -> Tensor:
    """Label with the highest weighted vote of the k nearest training rows; the smallest label wins a tie.

    Arguments, cost and reference as in :func:`knn_scores`, with ``tile`` rows of scores at a time.

    Returns:
        Labels of the query rows, int64 of shape (M,).

    Raises:
        ValueError: as :func:`knn_scores`.
    """
    classes, train_index = _check_knn(train, train_labels, query, k, temperature, num_classes, tile)
    predicted = torch.empty(len(query), dtype=torch.int64, device=query.device)
    with _rows.measuring(query.device):
        train, query = _rows.unit(train), _rows.unit(query)
        for rows in _rows.tiles(len(query), tile):
            votes = _votes(train, train_index, query[rows], min(k, len(train)), temperature, len(classes))
            predicted[rows] = classes[votes.argmax(dim=1)]
    return predicted


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    tile: int = 1024,
) -> float:
    """Share of query rows, in [0, 1], whose label :func:`knn_predict` finds.

    Args:
        train: embeddings with known labels, shape (N, D).
        train_labels: integer labels, shape (N,).
        query: embeddings to classify, shape (M, D), M >= 1.
        query_labels: their true labels, shape (M,).
        k: neighbours that vote.
        temperature: T > 0.
        tile: query rows at a time.

    Returns:
        The accuracy, a float.

    Raises:
        ValueError: as :func:`knn_scores`.
    """
    _checks.embeddings("query", query)
    _checks.labels("query_labels", query_labels, rows=len(query), of="query", device=query.device)
    predicted = knn_predict(train, train_labels, query, k=k, temperature=temperature, tile=tile)
    return _share_equal(predicted, query_labels)


def _check_knn(
    train: Tensor,
    train_labels: Tensor,
    query: Tensor,
    k: int,
    temperature: float,
    num_classes: int | None,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return the class of each score column and the column of each training row."""
    _checks.embeddings("train", train)
    _checks.embeddings("query", query, at_least=0)
    _checks.same_width(train=train, query=query)
    _checks.labels("train_labels", train_labels, rows=len(train), of="train", device=train.device)
    _checks.count("k", k)
    _checks.count("tile", tile)
    _checks.positive("temperature", temperature)
    if num_classes is None:
        classes, index = torch.unique(train_labels.long(), return_inverse=True)
        return classes, index
    _checks.count("num_classes", num_classes)
    low, high = int(train_labels.min()), int(train_labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"train_labels must lie in 0 .. {num_classes - 1} (num_classes), got {low} .. {high}."
        )
    return torch.arange(num_classes, device=train.device), train_labels.long()


def _votes(
    train: Tensor, train_index: Tensor, query: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Vote shares (M, C) of unit queries; the k best so far are merged with each tile of ``train``."""
    best = query.new_empty(len(query), 0)
    column = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for rows in _rows.tiles(len(train), _TRAIN_TILE):
        similarity = torch.cat([best, query @ train[rows].T], dim=1)
        index = torch.cat([column, train_index[rows].expand(len(query), -1)], dim=1)
        best, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
        column = index.gather(1, place)
    # Below the best, so that any temperature leaves 0 there and no infinity but -inf.
    below = best - best[:, :1]
    shares = torch.softmax(torch.where(below < 0, below / temperature, 0), dim=1)
    return query.new_zeros(len(query), num_classes).scatter_add_(1, column, shares)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted multinomial logistic regression on embeddings; made by :func:`linear_probe`.

    Attributes:
        weight: shape (C, D), float64; acts on embeddings as given (standardisation is folded in).
        bias: shape (C,), float64.
        classes: label of each row of ``weight``, int64 of shape (C,), ascending.
        regularization: the chosen L2 strength.
        validation_accuracy: accuracy on the validation rows at that strength, before any refit.
        path: (regularization, validation accuracy) of every strength tried, strongest first.
        converged: whether the fit reached its gradient tolerance before ``max_iterations``.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    regularization: float
    validation_accuracy: float
    path: tuple[tuple[float, float], ...]
    converged: bool

    def scores(self, z: Tensor, *, tile: int = 8192) -> Tensor:
        """Logits of embeddings (M, D): shape (M, C), columns in the order of ``classes``."""
        self._check(z, tile)
        scores = torch.empty(len(z), len(self.classes), dtype=self.weight.dtype, device=z.device)
        with _rows.measuring(z.device):
            for rows in _rows.tiles(len(z), tile):
                scores[rows] = _logits(self.weight, self.bias, z[rows])
        return scores

    def predict(self, z: Tensor, *, tile: int = 8192) -> Tensor:
        """Most likely label of each row of embeddings (M, D): int64 of shape (M,)."""
        self._check(z, tile)
        with _rows.measuring(z.device):
            return self.classes[_most_likely(self.weight, self.bias, z, tile)]

    def accuracy(self, z: Tensor, labels: Tensor, *, tile: int = 8192) -> float:
        """Share of the rows of embeddings (M, D), M >= 1, whose label is predicted."""
        _checks.embeddings("z", z)
        _checks.labels("labels", labels, rows=len(z), of="z", device=z.device)
        return _share_equal(self.predict(z, tile=tile), labels)

    def _check(self, z: Tensor, tile: int) -> None:
        _checks.embeddings("z", z, at_least=0)
        _checks.count("tile", tile)
        if z.shape[1] != self.weight.shape[1]:
            raise ValueError(f"z must have {self.weight.shape[1]} columns as in the fit, got {z.shape[1]}.")
        if z.device != self.weight.device:
            raise ValueError(f"z must be on the device of the probe, {self.weight.device}, got {z.device}.")


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    regularizations: Sequence[float] = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    standardize: bool = True,
    refit: bool = False,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    tile: int = 8192,
) -> LinearProbe:
    r"""Multinomial logistic regression on frozen embeddings, its L2 strength chosen on validation rows.

    For each strength lambda, from strong to weak and each starting at the last solution, minimises

        1/N sum_i -log softmax(W x_i + b)_{y_i}  +  lambda / 2 |W|^2

    by L-BFGS with a strong-Wolfe line search. Of equal validation accuracies the strongest lambda wins.
    scikit-learn's C is 1 / (lambda N).

    Args:
        train: embeddings to fit on, shape (N, D).
        train_labels: integer labels, shape (N,); any values.
        validation: embeddings that choose lambda, shape (V, D).
        validation_labels: their labels, shape (V,); a label without a training row counts as an error.
        regularizations: the lambdas to try, each > 0.
        standardize: give each feature mean 0 and variance 1 over ``train`` first; constant features stay.
        refit: fit once more on train and validation rows together at the chosen lambda.
        max_iterations: L-BFGS iterations for each lambda.
        tolerance: stop when no entry of the gradient exceeds this.
        tile: rows at a time.

    Returns:
        The fitted :class:`LinearProbe`.

    Raises:
        ValueError: if shapes, devices or dtypes differ, a value is not finite, or no lambda is given.

    Cost: O(N D C) time an iteration, O(tile (C + D) + C D) memory beside the inputs. Computed in float64.
    Reference: the protocol of Kornblith et al., "Do Better ImageNet Models Transfer Better?", CVPR 2019,
    arXiv 1805.08974.
    """
    _checks.embeddings("train", train)
    _checks.embeddings("validation", validation)
    _checks.same_width(train=train, validation=validation)
    _checks.labels("train_labels", train_labels, rows=len(train), of="train", device=train.device)
    _checks.labels(
        "validation_labels",
        validation_labels,
        rows=len(validation),
        of="validation",
        device=validation.device,
    )
    _checks.count("max_iterations", max_iterations)
    _checks.count("tile", tile)
    _checks.positive("tolerance", tolerance)
    if not regularizations:
        raise ValueError("regularizations must hold at least one number > 0, got none.")
    for strength in regularizations:
        _checks.positive("regularizations", strength)

    with _rows.measuring(train.device):
        problem = _Regression([(train, train_labels)], standardize, tile)
        theta, best, path = problem.start(), None, []
        for strength in sorted(set(regularizations), reverse=True):
            theta, converged = problem.fit(theta, strength, max_iterations, tolerance)
            accuracy = problem.accuracy(theta, validation, validation_labels)
            path.append((strength, accuracy))
            if best is None or accuracy > best.validation_accuracy:
                weight, bias = problem.solution(theta)
                best = LinearProbe(weight, bias, problem.classes, strength, accuracy, (), converged)
        assert best is not None
        if refit:
            problem = _Regression([(train, train_labels), (validation, validation_labels)], standardize, tile)
            theta, converged = problem.fit(problem.start(), best.regularization, max_iterations, tolerance)
            weight, bias = problem.solution(theta)
            best = replace(best, weight=weight, bias=bias, classes=problem.classes, converged=converged)
    return replace(best, path=tuple(path))


class _Regression:
    """The objective of :func:`linear_probe` over labelled blocks of rows, evaluated tile by tile.

    ``theta`` is (C, D + 1): weights in standardised coordinates, then the bias.
    """

    def __init__(self, blocks: list[tuple[Tensor, Tensor]], standardize: bool, tile: int) -> None:
        self.blocks, self.tile = blocks, tile
        features, _ = blocks[0]
        self.dtype = _rows.accumulation_dtype(features.device)
        self.rows = sum(len(labels) for _, labels in blocks)
        self.classes = torch.unique(torch.cat([labels.long() for _, labels in blocks]))
        self.mean = torch.zeros(features.shape[1], dtype=self.dtype, device=features.device)
        self.scale = torch.ones_like(self.mean)
        if standardize:
            self.mean = sum((x.sum(0) for x, _ in self._tiles()), start=self.mean) / self.rows
            # Centred before squaring, so that a large mean does not swallow a small variance.
            squares = (((x - self.mean) ** 2).sum(0) for x, _ in self._tiles())
            deviation = (sum(squares, start=torch.zeros_like(self.mean)) / self.rows).sqrt()
            constant = deviation <= 10 * torch.finfo(self.mean.dtype).eps * self.mean.abs()
            self.scale = torch.where(constant, 1, deviation)

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in self.blocks:
            for rows in _rows.tiles(len(features), self.tile):
                yield features[rows].to(self.dtype), torch.searchsorted(self.classes, labels[rows].long())

    def start(self) -> Tensor:
        return self.mean.new_zeros(len(self.classes), len(self.mean) + 1)

    def solution(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias that act on embeddings as given."""
        weight = theta[:, :-1] / self.scale
        return weight, theta[:, -1] - weight @ self.mean

    def accuracy(self, theta: Tensor, z: Tensor, labels: Tensor) -> float:
        return _share_equal(self.classes[_most_likely(*self.solution(theta), z, self.tile)], labels)

    def value_and_gradient(self, theta: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        # The standardisation is applied to the weights and the gradient, C x D, instead of to the N x D rows.
        weight, bias = self.solution(theta)
        value = strength / 2 * theta[:, :-1].square().sum()
        gradient = torch.zeros_like(theta)
        for x, target in self._tiles():
            log_share = torch.log_softmax(torch.addmm(bias, x, weight.T), dim=1)
            value = value - log_share.gather(1, target[:, None]).sum() / self.rows
            residual = log_share.exp_() / self.rows
            residual.scatter_add_(1, target[:, None], residual.new_full((len(x), 1), -1 / self.rows))
            gradient[:, :-1].addmm_(residual.T, x)
            gradient[:, -1] += residual.sum(0)
        gradient[:, :-1].addr_(gradient[:, -1], self.mean, alpha=-1).div_(self.scale)
        gradient[:, :-1] += strength * theta[:, :-1]
        return value, gradient

    def fit(self, theta: Tensor, strength: float, iterations: int, tolerance: float) -> tuple[Tensor, bool]:
        """Minimise from ``theta``; also say whether the gradient is within ``tolerance``."""
        theta = theta.clone()
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=iterations,
            max_eval=20 * iterations,
            tolerance_grad=1.0,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            # In units of the tolerance: the optimiser drops curvature pairs below an absolute 1e-10, which
            # near the minimum of the plain objective would be all of them.
            value, gradient = self.value_and_gradient(theta, strength)
            theta.grad = gradient / tolerance
            return value / tolerance

        optimizer.step(closure)
        _, gradient = self.value_and_gradient(theta, strength)
        return theta.detach(), bool(gradient.abs().max() <= tolerance)


def _logits(weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    return torch.addmm(bias, z.to(weight.dtype), weight.T)


def _most_likely(weight: Tensor, bias: Tensor, z: Tensor, tile: int) -> Tensor:
    """Row of ``weight`` with the largest logit for each row of ``z``."""
    winners = [_logits(weight, bias, z[rows]).argmax(dim=1) for rows in _rows.tiles(len(z), tile)]
    return torch.cat(winners) if winners else torch.empty(0, dtype=torch.int64, device=z.device)


def _share_equal(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()
