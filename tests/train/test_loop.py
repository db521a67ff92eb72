from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dsr_tool
from dsr_tool.errors import DsrError, UsageError
from dsr_tool.train import Observer, TrainSettings, evaluate, load_data, train
from dsr_tool.train.optimizers import lr_factor


class Listener(Observer):
    def __init__(self):
        self.steps, self.active, self.moves = [], [], []

    def on_step(self, step):
        self.steps.append(step)

    def on_reallocation(self, step, moved):
        self.moves.append((step, sum(moved.dropped.counts), sum(moved.grown.counts)))

    def on_epoch(self, model, _record):
        model.check()
        self.active.append(model.active_weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_the_number_of_active_weights_is_exact_after_every_epoch(tiny, optimizer):
    model, listener = tiny.model(), Listener()
    budget = model.active_weights
    result = train(model, tiny.data(), tiny.settings(epochs=4, every=2, optimizer=optimizer), [listener])
    assert listener.active == [budget] * 4 == [record.active_weights for record in result.epochs]
    assert listener.steps == list(range(1, 13)) and result.last.step == 12
    assert listener.moves and all(dropped == grown for _, dropped, grown in listener.moves)
    assert sum(dropped for _, dropped, _ in listener.moves) == sum(sum(r.dropped.values()) for r in result.epochs)


def test_records_agree_with_the_model(tiny):
    model = tiny.model()
    last = train(model, tiny.data(), tiny.settings(epochs=1, every=1, batch_size=8)).last
    assert last.density == pytest.approx({name: mask.float().mean().item() for name, mask in model.masks.items()})
    assert last.threshold and last.dropped.keys() == last.grown.keys() == model.masks.keys()
    assert last.lr == pytest.approx(0.0) and not model.module.training
    assert evaluate(model, tiny.data(), tiny.settings()) == pytest.approx((last.test_loss, last.test_accuracy))


def test_static_never_moves_a_weight(tiny):
    model = tiny.model()
    before = {name: mask.clone() for name, mask in model.masks.items()}
    result = train(model, tiny.data(), tiny.settings(method="static"))
    assert all(torch.equal(mask, before[name]) for name, mask in model.masks.items())
    assert result.last.threshold is None and not any(result.last.dropped.values())


def test_evaluation_is_exact_over_the_whole_set(tiny):
    model, data = tiny.model(), tiny.data("fake:100")
    loss, accuracy = evaluate(model, data, tiny.settings(batch_size=7))
    inputs, labels = next(data.test_batches(tiny.settings(batch_size=1000)))
    with torch.no_grad():
        outputs = model.module.eval()(inputs)
    assert loss == pytest.approx(cross_entropy(outputs, labels).item(), rel=1e-5)
    assert accuracy == (outputs.argmax(1) == labels).sum().item() / 20


def test_the_same_seed_gives_the_same_weights(tiny):
    states = []
    for seed in (0, 0, 1):
        model = tiny.model()
        train(model, tiny.data(), tiny.settings(seed=seed, augment="shift"))
        states.append({**model.module.state_dict(), **{f"mask {k}": v for k, v in model.masks.items()}})
    same, other = (all(torch.equal(states[0][name], states[i][name]) for name in states[0]) for i in (1, 2))
    assert same and not other


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_the_loop_trains_as_a_users_own_loop_does(tiny, storage):
    settings = tiny.settings(epochs=1, schedule="step", gamma=1.0, every=2, storage=storage)
    data, ours, theirs = tiny.data(), tiny.model(), tiny.model().to_storage(storage)
    train(ours, data, settings)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    optimizer = torch.optim.SGD(theirs.module.parameters(), 0.1, **options)
    dsr_tool.attach(theirs, optimizer, dsr_tool.methods.make("dsr", 3, every=2))
    for inputs, labels in data.train_batches(settings, 1):
        optimizer.zero_grad()
        cross_entropy(theirs(inputs), labels).backward()
        optimizer.step()
    one, other = ours.module.state_dict(), theirs.module.state_dict()
    names = [name for name, _ in ours.module.named_parameters()]
    assert all(torch.equal(one[name], other[name]) for name in names)


def test_the_global_random_state_is_restored(tiny):
    data, settings = tiny.data(), tiny.settings(epochs=1)
    model = tiny.model()
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    train(model, data, settings)
    assert torch.equal(torch.rand(2), expected)


def test_bf16_on_a_cpu_keeps_fp32_weights_and_changes_the_loss_little(tiny):
    model = tiny.model()
    result = train(model, tiny.data(), tiny.settings(precision="bf16"))
    full = train(tiny.model(), tiny.data(), tiny.settings())
    assert {weight.dtype for weight in model.module.parameters()} == {torch.float32}
    assert result.last.train_loss == pytest.approx(full.last.train_loss, rel=0.05)
    assert result.last.train_loss != full.last.train_loss


def test_the_loss_of_auxiliary_outputs_has_weight_0_3(tiny):
    outputs = namedtuple("Outputs", ["logits", "aux_logits2", "aux_logits1"])

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(192, 10), nn.Linear(192, 10)

        def forward(self, x):
            x = x.flatten(1)
            return outputs(self.main(x), None, self.side(x)) if self.training else self.main(x)

    torch.manual_seed(0)
    module = Auxiliary()
    model = dsr_tool.convert(module, sparsity=0.5, input_shape=(3, 8, 8))
    data, settings = tiny.data(), tiny.settings(epochs=1, batch_size=200)
    inputs, labels = next(data.train_batches(settings, 1))
    main, _, side = module.train()(inputs)
    expected = cross_entropy(main, labels) + 0.3 * cross_entropy(side, labels)
    assert train(model, data, settings).last.train_loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_that_is_nan_or_inf_stops_the_training(tiny):
    listener = Listener()
    with pytest.raises(DsrError, match=r"NaN or inf at step \d+ \(.*\); lower --lr"):
        train(tiny.model(), tiny.data(), tiny.settings(lr=1e30, epochs=5), [listener])
    assert len(listener.active) < 5


def test_a_failed_compilation_is_an_error_with_a_remedy(tiny, monkeypatch):
    def fail(_):
        raise torch._dynamo.exc.TorchDynamoException("inductor raised:\nno compiler\n\nlong story")

    monkeypatch.setattr("torch.compile", lambda *_, **__: fail)
    with pytest.raises(DsrError, match=r"torch.compile failed \(inductor raised: no compiler\); leave out --compile"):
        train(tiny.model(), tiny.data(), tiny.settings(compile=True))


def test_batches_larger_than_the_data_are_one_batch(tiny):
    assert train(tiny.model(), tiny.data("fake:10"), tiny.settings(batch_size=999)).last.step == 2


def test_wrong_settings_stop_before_anything_is_touched(tiny):
    model = tiny.model()
    with pytest.raises(UsageError, match="--epochs 0"):
        train(model, tiny.data(), TrainSettings(epochs=0))


def test_digits_are_learnt_at_a_fifth_of_the_weights(tiny):
    model = tiny.model()
    data = load_data("digits", model.config)
    result = train(model, data, tiny.settings(epochs=8, every=20, augment="none"))
    assert result.best.test_accuracy > 0.6 > result.epochs[0].test_accuracy
    assert result.last.train_loss < result.epochs[0].train_loss / 2


def test_a_warmup_may_round_up_to_the_whole_training(tiny):
    factor = lr_factor(tiny.settings(epochs=1, warmup_epochs=0.9), 2)
    assert [factor(step) for step in range(4)] == [0.5, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("outputs", [{"out": torch.zeros(2, 10)}, torch.zeros(2, 10, 8, 8), torch.zeros(2, 9)])
def test_outputs_that_are_not_scores_are_refused(tiny, outputs):
    model = tiny.model()
    model.module.forward = lambda _: outputs
    with pytest.raises(UsageError, match="score for each of the 10 classes"):
        train(model, tiny.data(), tiny.settings())


@pytest.mark.parametrize("last", [True, False])
def test_activations_follow_the_memory_format_of_the_images(tiny, last):
    model, seen = tiny.model(), []

    def look(_module, _inputs, output):
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    hooks = [layer.register_forward_hook(look) for layer in (model.module.first, model.module.norm)]
    train(model, tiny.data(), tiny.settings(epochs=1, channels_last=last, storage="masked"))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {last} and model.module.first.weight.is_contiguous()
