"""Pictures are drawn for real and their pixels looked at."""

import builtins
import io

import matplotlib
import pytest
import torch

from hf_flashprefill import (
    BlockIndex,
    FlashPrefillConfig,
    LayerStats,
    PrefillStats,
    flash_prefill_attention,
    patched,
    prefill_stats,
)
from hf_flashprefill.plotting import DROPPED, KEPT, plot_block_index, plot_density

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def index():
    """Lists of 1000 tokens and two heads with about half of the blocks, at random."""
    states = torch.randn(1, 2, 1000, 64)
    whole = flash_prefill_attention(states, states, states, config=FlashPrefillConfig(alpha=0), return_index=True).index
    mask = (torch.rand(1, 2, 8, 8) < 0.4).tril() | torch.eye(8, dtype=torch.bool)
    return BlockIndex.from_mask(mask, whole.geometry)


def pixels(ax):
    """The rendered picture as [height, width, 3] from 0 to 1, through a PNG."""
    file = io.BytesIO()
    ax.figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    return torch.tensor(matplotlib.pyplot.imread(file))[..., :3]


def share(picture, colour):
    return ((picture - torch.tensor(colour)).abs().amax(-1) < 0.02).float().mean().item()


def test_kept_and_dropped_blocks_have_the_area_they_should(index):
    picture = pixels(plot_block_index(index, head=1))
    kept = index.counts[0, 1].sum().item() / 36
    assert 0.3 < kept < 1
    found = share(picture, KEPT) / (share(picture, KEPT) + share(picture, DROPPED))
    assert found == pytest.approx(kept, abs=0.02)


def test_attention_is_inked_where_it_is(index):
    def inked(attention):
        bare, drawn = (pixels(plot_block_index(index, map_)) for map_ in (torch.zeros(1000, 1000), attention))
        return (bare - drawn).amax(-1) > 0.2

    vertical, slash, faint = torch.zeros(1000, 1000), torch.zeros(1000, 1000), torch.full((1000, 1000), 1e-4)
    vertical[:, :64] = 1
    slash.diagonal(-300).fill_(1)
    dark = inked(vertical)
    width, height = dark.any(0).sum().item(), dark.any(1).sum().item()
    assert dark.sum() == width * height
    assert height / width == pytest.approx(1000 / 64, rel=0.05)
    dark = inked(slash)
    # A thin line from (0, 300) to (700, 1000): as high as it is wide, few pixels in any row or column.
    assert dark.any(0).sum().item() == pytest.approx(0.7 * height, rel=0.05)
    assert dark.any(1).sum().item() == pytest.approx(0.7 * height, rel=0.05)
    assert max(dark.sum(0).max(), dark.sum(1).max()) < 6
    assert not inked(faint).any()


def test_a_later_chunk_is_drawn_at_its_place():
    query, key = torch.randn(1, 1, 256, 64), torch.randn(1, 1, 640, 64)
    index = flash_prefill_attention(query, key, key, config=FlashPrefillConfig(alpha=0), return_index=True).index
    ax = plot_block_index(index, torch.zeros(256, 640))
    assert ax.get_ylim() == (5, 3)
    assert ax.get_xlim() == (0, 5)
    assert "100%" in ax.get_title()


def test_density_of_a_model(recall_model):
    model = recall_model[0]
    with patched(model, alpha=0.5, min_seq_len=1, dense_layers=(1,)), torch.no_grad():
        model(torch.randint(3, 4000, (1, 900)), logits_to_keep=1)
        stats = prefill_stats(model)
        ax = plot_density(stats)
    assert [text.get_text() for text in ax.get_yticklabels()] == [str(layer.layer) for layer in stats.layers]
    shown = {text.get_text() for text in ax.texts}
    assert f"{stats.layers[0].head_density[0]:.2f}" in shown
    assert len(ax.texts) == model.config.num_attention_heads * (model.config.num_hidden_layers - 1)
    # Neither blank nor one flat colour.
    assert pixels(ax).flatten(0, 1).unique(dim=0).shape[0] > 100


def test_layers_may_have_fewer_heads_than_others():
    ax = plot_density(PrefillStats([LayerStats(0, 1, {}, 0.5, [0.5] * 2), LayerStats(1, 1, {}, 0.5, [0.5] * 4)]))
    assert len(ax.texts) == 6


def test_full_layers_are_dark_and_empty_ones_light():
    def blue(value):
        picture = pixels(plot_density(PrefillStats([LayerStats(0, 1, {}, value, [value] * 200)])))
        return picture[40:60, 60:200].mean()

    assert blue(1.0) < blue(0.5) < blue(0.0)


def test_figures_of_the_caller_are_used(index):
    axes = matplotlib.pyplot.subplots()[1]
    assert plot_block_index(index, ax=axes) is axes


def test_what_does_not_fit_is_refused(index):
    with pytest.raises(ValueError, match="head must be from 0 to 1, got 2"):
        plot_block_index(index, head=2)
    with pytest.raises(ValueError, match="row must be from 0 to 0, got -1"):
        plot_block_index(index, row=-1)
    with pytest.raises(ValueError, match=r"shape \[queries, keys\] \(1000, 1000\), got \(10, 10\)"):
        plot_block_index(index, torch.zeros(10, 10))
    with pytest.raises(ValueError, match="ran sparse"):
        plot_density(PrefillStats([LayerStats(0, 0, {"short": 3}, None, [])]))


def test_padded_rows(index):
    query, key = torch.randn(2, 1, 512, 64), torch.randn(2, 1, 512, 64)
    ranges = torch.tensor([[200, 512], [0, 512]])
    result = flash_prefill_attention(query, key, key, config=FlashPrefillConfig(), valid_ranges=ranges, return_index=True)
    assert plot_block_index(result.index, row=0).get_ylim() == (3, 0)
    with pytest.raises(ValueError, match="padded"):
        plot_block_index(result.index, torch.zeros(512, 512))


def test_without_matplotlib_the_error_says_what_to_install(index, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install"):
        plot_block_index(index)
