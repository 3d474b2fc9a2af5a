"""The offline linear evaluation: its accuracy, and the threads that it leaves behind."""

import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from lightning_contrast import evaluation


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_during_the_fit_and_its_own_number_after_it(monkeypatch):
    during, fit = [], LogisticRegression.fit

    def watched(self, *arguments):
        during.append(blas_threads())
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 3) + 9 * labels[:, None]  # two classes far apart
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert evaluation.linear_top1(features, labels, features, 1 - labels) == 0
        assert evaluation.linear_top1(features, labels, features, labels) == 1
        assert blas_threads() == before
    assert during == [{1}, {1}]
