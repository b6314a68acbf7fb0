"""Golden variances of the mean of a prompts x seeds table, by cluster sums over rows written out one by one.

Made with Python 3.11.7, numpy 2.4.6, scipy 1.17.1; run `python intervals.py` in this folder, which writes intervals.json.

A prompt of weight u is written out u times for each seed. The parts are then the cluster-robust variances (Liang and Zeger,
1986) of the plain mean of those rows: clustered by prompt, by seed, and by cell of the least-squares residuals of
`prompt + seed`, each with its factor for few clusters. Where the weights are equal, they are also compared here with the
mean squares of the textbook's two-way analysis of variance without replication, divided by the number of cells.
"""

import json
import pathlib
import platform

import numpy as np
import scipy
from scipy import stats

HERE = pathlib.Path(__file__).parent
LEVEL = 0.95


def tables():
    rng = np.random.default_rng(0)
    prompts, seeds = rng.normal(size=(4, 1)), rng.normal(size=(1, 3))
    yield "equal weights", np.ones(4, int), prompts + 0.5 * seeds + 0.25 * rng.normal(size=(4, 3))
    yield "unequal weights", np.array([1, 4, 2, 1, 3, 1]), rng.integers(-4, 5, size=(6, 5)) / 4 + 0.1
    yield "seeds dominate", np.array([2, 1, 1, 5, 1]), 3 * rng.normal(size=(1, 2)) + 0.1 * rng.normal(size=(5, 2))
    yield "parts alike", np.array([2, 2, 1]), np.array([[0.25, 0.5, -0.75], [1.0, 0.0, 0.5], [0.0, 0.75, -0.25]])
    yield "interaction alone", np.ones(2, int), np.array([[1.0, -1.0], [-1.0, 1.0]])


def written_out(weights, table):
    """Values, prompts and seeds of the rows, each `[N]`."""
    cells = [(table[p, s], p, s) for p, u in enumerate(weights) for _ in range(u) for s in range(table.shape[1])]
    values, prompts, seeds = zip(*cells)
    return np.array(values), np.array(prompts), np.array(seeds)


def clustered(residuals, clusters):
    return sum(residuals[clusters == c].sum() ** 2 for c in np.unique(clusters)) / len(residuals) ** 2


def parts(weights, table):
    n_prompts, n_seeds = table.shape
    values, prompts, seeds = written_out(weights, table)
    deviations = values - values.mean()
    design = np.hstack([np.eye(n_prompts)[prompts], np.eye(n_seeds)[seeds]])
    residuals = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    of_prompts = n_prompts / (n_prompts - 1) * clustered(deviations, prompts)
    of_seeds = n_seeds / (n_seeds - 1) * clustered(deviations, seeds)
    free = (n_prompts - 1) * (n_seeds - 1)
    of_residuals = n_prompts * n_seeds / free * clustered(residuals, prompts * n_seeds + seeds)
    return values.mean(), of_prompts, of_seeds, of_residuals


def mean_squares(table):
    n_prompts, n_seeds = table.shape
    by_prompt, by_seed = stats.sem(table.mean(1)) ** 2, stats.sem(table.mean(0)) ** 2
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return by_prompt, by_seed, (rest**2).sum() / ((n_prompts - 1) * (n_seeds - 1)) / table.size


def golden(name, weights, table):
    mean, of_prompts, of_seeds, of_residuals = parts(weights, table)
    if (weights == 1).all():
        np.testing.assert_allclose((of_prompts, of_seeds, of_residuals), mean_squares(table), rtol=1e-12, atol=1e-30)
    variance = max(of_prompts + of_seeds - of_residuals, of_prompts, of_seeds, of_residuals)
    freedoms = table.shape[0] - 1, table.shape[1] - 1
    pooled = of_prompts**2 / freedoms[0] + of_seeds**2 / freedoms[1] + of_residuals**2 / (freedoms[0] * freedoms[1])
    freedom = max(variance**2 / pooled, min(freedoms))
    return {
        "name": name,
        "weights": [float(weight) for weight in weights],
        "table": table.tolist(),
        "mean": mean,
        "prompts": of_prompts,
        "seeds": of_seeds,
        "residuals": of_residuals,
        "variance": variance,
        "freedom": freedom,
        "t": stats.t.ppf((1 + LEVEL) / 2, freedom),
    }


def quantiles():
    """Student's t by degrees of freedom and level, over all that the module asks for."""
    for freedom in [1, 1.01, 1.37, 2, 2.5, 3, 4, 5.8, 9.99, 17, 59, 236.4, 1000, 3333.3, 10_000]:
        for level in [0.5, 0.8, 0.9, 0.95, 0.99, 0.999]:
            yield {"freedom": freedom, "level": level, "t": stats.t.ppf((1 + level) / 2, freedom)}


if __name__ == "__main__":
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    content = {"versions": versions, "tables": [golden(*t) for t in tables()], "quantiles": list(quantiles())}
    (HERE / "intervals.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
