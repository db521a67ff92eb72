"""The projection of dst to an exact count costs little accuracy: measured right before and right after it."""

import pytest

from dsr_tool.train import Observer, evaluate, load_data, train
from dsr_tool.train.settings import TrainSettings


class Projection(Observer):
    """Evaluates after every update; the last one is the projection."""

    def __init__(self, data, settings):
        self.data, self.settings, self.facts, self.accuracies = data, settings, [], []

    def on_start(self, model, _total_steps):
        self.model = model

    def on_reallocation(self, _step, moved):
        self.accuracies.append(evaluate(self.model, self.data, self.settings)[1])
        self.model.module.train()
        self.facts.append(moved.facts)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_the_projection_moves_little_and_costs_little(tiny, monkeypatch, sparsity):
    model = tiny.model(0)
    data = load_data("digits", model.config)
    options = {"final_sparsity": sparsity}
    settings = tiny.settings(method="dst", epochs=20, every=2, augment="none", options=options)
    observer, before = Projection(data, settings), []
    update = TrainSettings.make_method

    def make_method(given, total_steps):
        method = update(given, total_steps)
        decide = method.update

        def evaluated(weights, step, generator):
            if step == method.final_step:
                before.append(evaluate(model, data, settings)[1])
                model.module.train()
            return decide(weights, step, generator)

        method.update = evaluated
        return method

    monkeypatch.setattr(TrainSettings, "make_method", make_method)
    result = train(model, data, settings, [observer])
    facts = observer.facts[-1]
    print(sparsity, before, observer.accuracies[-1], result.last.test_accuracy, facts)
    assert facts["density_before_projection"] == pytest.approx(1 - sparsity, rel=0.3)
    assert facts["moved_by_projection"] < 0.05 * model.prunable_weights
    assert before[0] - observer.accuracies[-1] < 0.1
    assert result.last.test_accuracy > before[0] - 0.05
    assert model.active_weights == round(model.prunable_weights * (1 - sparsity))
