"""A classifier of an architecture that transformers doesn't know, in one file: the code of a checkpoint."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class StrangeConfig(PretrainedConfig):
    model_type = "strange"

    def __init__(self, width=8, depths=(1, 2), image_size=32, num_channels=3, loops=1, **more):
        super().__init__(**more)
        self.width, self.depths, self.image_size, self.num_channels = width, list(depths), image_size, num_channels
        self.loops = loops


class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, grid):
        return grid + torch.relu(self.norm(self.spread(grid)))


class Level(nn.Module):
    """Blocks, and registered after them what runs in front of them."""

    def __init__(self, width, depth, *, is_first):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))
        self.steps = nn.ModuleList(Mixer(width) for _ in range(depth))
        self.shrink = nn.Identity() if is_first else nn.Conv2d(width, width, 2, 2)

    def forward(self, grid):
        grid = self.shrink(grid) + self.shift
        for step in self.steps:
            grid = step(grid)
        return grid


class StrangeNet(PreTrainedModel):
    config_class = StrangeConfig
    base_model_prefix = "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.answer = nn.Linear(config.width, config.num_labels)  # registered first, run last
        self.scale = nn.Parameter(torch.ones(config.width, 1, 1))
        self.entry = nn.Conv2d(config.num_channels, config.width, 4, 4)
        self.levels = nn.ModuleList(
            Level(config.width, depth, is_first=number == 0) for number, depth in enumerate(config.depths)
        )
        self.last_norm = nn.LayerNorm(config.width)
        self.post_init()

    def forward(self, pixel_values=None, labels=None):
        grid = self.entry(pixel_values) * self.scale
        for _ in range(self.config.loops):
            for level in self.levels:
                grid = level(grid)
        logits = self.answer(self.last_norm(grid.mean((2, 3))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
