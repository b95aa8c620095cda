"""What timm's own tests ask of each of its models, asked of six of ours and of timm's ConvMixer.

In our own words: timm's repository has these checks for all that is registered. Models are small here, their names
and their code are those of the paper's tables.
"""
import copy
import importlib
import io
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import FeatureInfo
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import convmixer_edu.registry as registry
from convmixer_edu.model import PAPER_MODELS, ConvMixer, PatchEmbedding

pytestmark = [pytest.mark.filterwarnings("ignore:Using padding='same'"),
              pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")]

OURS = {  # the name, and what makes an image of 32 pixels a grid of 8 or less
    "convmixer_edu_128_4": dict(patch_size=4), "convmixer_edu_128_8": dict(patch_size=4, kernel_size=3),
    "convmixer_edu_256_8": dict(patch_size=8), "convmixer_edu_256_10": dict(patch_size=8),
    "convmixer_edu_512_12": dict(), "convmixer_edu_1024_12": dict(patch_size=14),
}
THEIRS = "convmixer_1024_20_ks9_p14"  # the witness that the questions are fair


def make(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**OURS.get(name, {}), **kwargs}).eval()


def image(batch=1, seed=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[*OURS, THEIRS], scope="module")
def name(request):
    if request.param == THEIRS and not hasattr(TimmConvMixer, "forward_intermediates"):
        pytest.skip("timm's ConvMixer can all this from timm 1.0.31 on; ours is asked in any case")
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return make(name)


def patch(model):
    return model.feature_info[0]["reduction"]


def test_forward(model):
    logits = model(image(2))
    assert logits.shape == (2, model.num_classes) and logits.isfinite().all()


def test_backward_reaches_every_weight(name):
    model = make(name, num_classes=42).train()
    logits = model(image(2))
    logits.mean().backward()
    assert logits.shape[-1] == 42 and logits.isfinite().all()
    assert not [key for key, w in model.named_parameters() if w.grad is None]


def test_config_names_layers_that_are_there(model):
    config, keys = model.default_cfg, model.state_dict()
    assert f"{config['classifier']}.weight" in keys and f"{config['first_conv']}.weight" in keys
    assert {"input_size", "mean", "std", "interpolation", "crop_pct", "num_classes"} <= set(config)


def test_head_can_be_left_out_step_by_step(name):
    """Pooled and not, by reset_classifier, by forward_head and by the arguments; always the same features."""
    x, model = image(2), make(name)
    grid = model.forward_features(x)
    side = 32 // patch(model)
    assert grid.shape == (2, model.num_features, side, side)
    pooled = model.forward_head(grid, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(grid), model(x))
    assert torch.allclose(model.get_classifier()(pooled), model(x), atol=1e-6)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and model.num_classes == 0
    model.reset_classifier(0, "")
    assert torch.equal(model(x), grid)
    assert make(name, num_classes=0)(x).shape == pooled.shape
    assert make(name, num_classes=0, global_pool="")(x).shape == grid.shape
    assert model.default_cfg["classifier"] + ".weight" not in model.state_dict()


def test_another_classifier(name):
    model = make(name)
    before = model.state_dict()
    model.reset_classifier(3)
    assert model(image(2)).shape == (2, 3) and model.num_classes == 3
    assert list(model.state_dict()) == list(before)
    model.reset_classifier(5, "max")
    assert model(image(2)).shape == (2, 5) and model.num_classes == 5


@pytest.mark.parametrize("pool, times", [("max", 1), ("avgmax", 1), ("catavgmax", 2)])
def test_another_pooling(name, pool, times):
    model, x = make(name, global_pool=pool), image(2)
    assert model.head_hidden_size == times*model.num_features
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    wanted = SelectAdaptivePool2d(pool_type=pool, flatten=True)(model.forward_features(x))
    assert torch.allclose(pooled, wanted) and model(x).shape == (2, model.num_classes)


def test_features_only(name):
    model = make(name, features_only=True)
    assert len(model.feature_info.channels()) == 3  # the last three, as timm's ConvMixer gives
    for feature, channels, step in zip(model(image()), model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert feature.shape == (1, channels, 32//step, 32//step) and feature.isfinite().all()


@pytest.mark.parametrize("kind", ["getter", "fx"])
def test_features_of_chosen_blocks(name, kind):
    whole, x = make(name), image()
    _, wanted = whole.forward_intermediates(x, indices=[0, 2, 3])
    some = make(name, features_only=True, out_indices=(0, 2, 3), feature_cls=kind)
    for ours, theirs in zip(some(x), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_intermediates(model):
    x, depth = image(), len(model.feature_info)
    info = FeatureInfo(model.feature_info, list(range(depth)))
    last, found = model.forward_intermediates(x)
    assert len(found) == depth and torch.allclose(last, model.forward_features(x), atol=1e-6)
    for feature, channels, step in zip(found, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (1, channels, 32//step, 32//step)
    few = model.forward_intermediates(x, indices=[1, -1], intermediates_only=True)
    assert torch.equal(few[0], found[1]) and torch.equal(few[1], found[-1])
    stopped, two = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(stopped, found[1]) and len(two) == 2
    assert len(model.forward_intermediates(x, indices=2)[1]) == 2


def test_blocks_can_be_cut_off(name):
    model, x = make(name), image()
    wanted = model.forward_intermediates(x, indices=[1])[1][0]
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert torch.equal(model(x), wanted) and torch.equal(model.forward_features(x), wanted)


def test_checkpointing_changes_no_gradient(name):
    gradients, calls = [], []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        counter = convs[1].register_forward_hook(lambda *_: calls.append(enable))
        model(image(2)).square().mean().backward()
        counter.remove()
        gradients.append([w.grad for w in model.parameters()])
    assert calls.count(False) == 1 and calls.count(True) == 2  # computed again on the way back
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_groups_by_depth(model):
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(w): g["lr_scale"] for g in groups for w in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    by_key = {key: scale[id(w)] for key, w in model.named_parameters()}
    stem, head = by_key[model.default_cfg["first_conv"] + ".weight"], by_key[model.default_cfg["classifier"] + ".weight"]
    assert head == 1 and stem == min(by_key.values()) < head
    assert len(set(by_key.values())) >= len(model.feature_info) + 1  # each block its own


def test_torchscript(model):
    x = image(2)
    frozen = torch.jit.script(model)
    kept = io.BytesIO()
    torch.jit.save(frozen, kept)
    kept.seek(0)
    assert torch.allclose(torch.jit.load(kept)(x), model(x), atol=1e-6)


def test_fx(model):
    x = image(2)
    assert torch.allclose(torch.fx.symbolic_trace(model)(x), model(x), atol=1e-6)
    block = model.feature_info[1]["module"]
    middle = create_feature_extractor(model, {block: "out"})(x)["out"]
    assert torch.allclose(middle, model.forward_intermediates(x, [1])[1][0], atol=1e-6)


def test_fx_backward(name):
    model = make(name).train()
    traced = torch.fx.symbolic_trace(model)
    traced(image(2)).mean().backward()
    assert not [key for key, w in traced.named_parameters() if w.grad is None]


def test_export(model):
    x = image(2)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(model, copied):
    other, x = copied(model), image(2)
    assert torch.equal(other(x), model(x)) and other.num_classes == model.num_classes
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert not {w.data_ptr() for w in other.parameters()} & {w.data_ptr() for w in model.parameters()}


def test_device_and_dtype(name):
    model = make(name, device="meta", dtype=torch.float64)
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.is_meta and t.dtype == torch.float64 for t in tensors)
    half = make(name, dtype=torch.bfloat16)
    assert half(image().bfloat16()).dtype == torch.bfloat16
    half.reset_classifier(7)
    assert half(image().bfloat16()).shape == (1, 7)


def test_dropout_before_the_classifier(name):
    model, x = make(name, drop_rate=0.5), image(2)
    assert torch.equal(model(x), make(name)(x))  # none in evaluation
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert not torch.equal(model(x), model(x))


def test_arguments_that_are_none_mean_the_default(name):
    assert make(name, drop_path_rate=None, in_chans=None).in_chans == 3


# ---------------------------------------------------------------- ours alone


def test_slices_and_indices_are_those_of_a_sequential():
    model = make("convmixer_edu_128_4")
    assert type(model[:3]) is nn.Sequential and len(model[3:-3]) == 4
    assert torch.equal(model[:-3](image()), model.forward_features(image()))
    assert isinstance(model[-1], nn.Linear)


def test_a_checkpoint_of_the_six_lines_loads():
    model, plain = make("convmixer_edu_128_4"), ConvMixer(128, 4, 8, 4, 10).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(image()), plain(image()))


def test_its_weights_are_drawn_as_those_of_the_six_lines():
    model = make("convmixer_edu_128_4")
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ConvMixer(128, 4, 8, 4, 10).parameters()))


def entry_name(size):
    return "convmixer_edu_{}_{}".format(*size)


def test_every_model_of_the_papers_tables_is_registered():
    assert sorted(timm.list_models("convmixer_edu*")) == sorted(map(entry_name, PAPER_MODELS))
    assert len(PAPER_MODELS) == 17
    assert set(map(entry_name, PAPER_MODELS)) <= set(registry.__all__)
    assert all(hasattr(registry, name) for name in registry.__all__)


@pytest.mark.parametrize("size", list(PAPER_MODELS), ids=entry_name)
def test_registered_defaults_are_the_tables(size):
    k, p, data = PAPER_MODELS[size]
    with torch.device("meta"):
        model = timm.create_model(entry_name(size))
        expected = ConvMixer(*size, k, p, data["num_classes"])
    assert {n: w.shape for n, w in model.state_dict().items()} == {
        n: w.shape for n, w in expected.state_dict().items()}
    assert model.num_classes == data["num_classes"] == model.pretrained_cfg["num_classes"]
    assert model.num_features == size[0]
    config = timm.data.resolve_model_data_config(model)
    imagenet = data["num_classes"] == 1000
    assert config["interpolation"] == "bicubic"
    assert config["input_size"] == ((3, 224, 224) if imagenet else (3, 32, 32))
    assert config["crop_pct"] == (0.96 if imagenet else 1.0)
    names = dict(model.named_modules())
    assert isinstance(names[model.pretrained_cfg["classifier"]], nn.Linear)
    assert isinstance(names[model.pretrained_cfg["first_conv"]], PatchEmbedding)


def test_sizes_of_a_registered_model_can_be_chosen():
    model = timm.create_model("convmixer_edu_128_4", kernel_size=5, patch_size=4, num_classes=3,
                              in_chans=1)
    assert model[3][0].fn[0].kernel_size == (5, 5) and model[0].kernel_size == (4, 4)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert model.num_classes == 3


def test_timms_scripts_can_create_and_save_a_registered_model(tmp_path):
    # the arguments that timm's train.py, validate.py and benchmark.py pass along
    model = timm.create_model(
        "convmixer_edu_128_4", pretrained=False, in_chans=None, num_classes=None, drop_rate=0.0,
        drop_path_rate=None, drop_block_rate=None, global_pool="fast", bn_momentum=None,
        bn_eps=None, scriptable=False, checkpoint_path="")
    create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=1e-2)
    torch.save(model.state_dict(), tmp_path/"last.pth.tar")
    again = timm.create_model("convmixer_edu_128_4", checkpoint_path=str(tmp_path/"last.pth.tar"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 again.state_dict().values()))


@pytest.mark.parametrize("wrong, named", [(dict(global_pool="median"), "global_pool.*median"),
                                          (dict(num_classes=-1), "num_classes.*-1"),
                                          (dict(kernel_size=-9), "kernel_size.*-9")])
def test_what_a_registered_model_cannot_do_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        timm.create_model("convmixer_edu_128_4", **wrong)


def test_there_are_no_pretrained_weights_and_timm_says_so():
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("convmixer_edu_128_4", pretrained=True)


def test_importing_twice_does_not_warn():
    first = dict(vars(registry))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            importlib.reload(registry)
        assert vars(registry)["TimmConvMixer"] is not first["TimmConvMixer"]
        assert timm.create_model("convmixer_edu_128_4").num_classes == 10
    finally:
        vars(registry).update(first)  # the other tests hold the first classes
