"""A loop of one's own: two models that train against each other on handwritten digits, one step of each in turn."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus

from samestep.train import OwnLoop, TrainConfig

NOISE = 16


@dataclass
class GanConfig(TrainConfig):
    epochs: int = 20
    global_batch_size: int = 60
    log_every: int = 10


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())

    def draw(self, count: int, device: torch.device) -> Tensor:
        return self(torch.randn(count, NOISE, device=device))


def main() -> None:
    with OwnLoop(GanConfig) as loop:
        images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
        generator = Generator()
        critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(128, 1))
        of_generator = torch.optim.Adam(generator.parameters(), lr=0.001, betas=(0.5, 0.999))
        of_critic = torch.optim.Adam(critic.parameters(), lr=0.001, betas=(0.5, 0.999))
        critic_gradients, generator_gradients = loop.gradients(critic), loop.gradients(generator)

        keep = {"critic": critic, "generator": generator, "of_critic": of_critic, "of_generator": of_generator}
        for step in loop.steps(images, keep=keep):
            for real in critic_gradients.over(step):
                fake = generator.draw(len(real), loop.device).detach()
                critic_gradients.backward(softplus(-critic(real)).mean() + softplus(critic(fake)).mean())
            of_critic.step()

            critic.requires_grad_(False)
            for real in generator_gradients.over(step):
                fake = generator.draw(len(real), loop.device)
                generator_gradients.backward(softplus(-critic(fake)).mean())
            of_generator.step()
            critic.requires_grad_(True)


if __name__ == "__main__":
    main()
