"""Pretrain the text encoder of the embedded base, so that it binds attributes to objects.

    python scripts/train_text_encoder.py

It reads one caption of a scene, and a small decoder that attends to it must write another caption of the same
scene, with other words in another order. This requires knowing which color and material belong to which
shape. A text encoder that is trained together with the UNet learns this late, because only the noisiest
timesteps require it; Stable Diffusion's text encoder was pretrained, too. The same command resumes an
interrupted run. It writes a `CLIPTextModel`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from embedded_data import (
    PHRASINGS,
    Loss,
    SceneCache,
    add_scene_options,
    load_scenes,
    run_training,
    scene_identity,
    train_tokenizer,
    training_parser,
)
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.loop import step_generator
from nexus_adapters.training.precision import autocast

TEXT_WIDTH = 160
HEADS = 5
MAX_TOKENS = 77


def build_text_encoder(tokenizer: CLIPTokenizer, device: str = "cpu") -> CLIPTextModel:
    """Return a CLIP text model with three layers and the captions' vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager" if device == "cpu" else "sdpa",  # faster to train there
        )
    ).to(device)


class Paraphraser(nn.Module):
    """Predicts the next token of a caption from its previous tokens and another caption's embeddings."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.places = nn.Embedding(MAX_TOKENS, TEXT_WIDTH)
        for table in (self.words, self.places):  # `words` also gives the logits, which should start small
            nn.init.normal_(table.weight, std=TEXT_WIDTH**-0.5)
        layer = nn.TransformerDecoderLayer(
            TEXT_WIDTH, HEADS, 4 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, 2, nn.LayerNorm(TEXT_WIDTH))

    def forward(
        self, tokens: Int[Tensor, "b n"], prompt_embeds: Float[Tensor, "b m d"], is_padding: Tensor
    ) -> Float[Tensor, "b n v"]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        causal = torch.ones(len(places), len(places), dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.layers(
            self.words(tokens) + self.places(places),
            prompt_embeds,
            tgt_mask=causal,
            memory_key_padding_mask=is_padding,
        )
        return hidden @ self.words.weight.T


def build_loss(
    modules: nn.ModuleDict, scenes: SceneCache, eos: int, batch_size: int, seed: int, device: str
) -> Loss:
    """Return step -> cross-entropy of a caption's tokens, given another caption of the same scene."""

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        indices = torch.randint(len(scenes), (batch_size,), generator=generator)
        read = torch.randint(PHRASINGS, (batch_size,), generator=generator)
        said = (read + torch.randint(1, PHRASINGS, (batch_size,), generator=generator)) % PHRASINGS
        source, target = (
            _cut(scenes.tokens[indices, chosen].long().to(device), eos) for chosen in (read, said)
        )
        # After the end token, which is also the padding, there is nothing to read or predict.
        is_padding = (source == eos).cumsum(1) > 1
        labels = target[:, 1:].masked_fill((target[:, 1:] == eos).cumsum(1) > 1, -100)
        with autocast(device):
            prompt_embeds = modules["text_encoder"](source)[0]
            logits = modules["paraphraser"](target[:, :-1], prompt_embeds, is_padding)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return loss_of_step


def _cut(tokens: Int[Tensor, "b 77"], eos: int) -> Int[Tensor, "b n"]:
    """The tokens without columns that are padding in every row."""
    return tokens[:, : int((tokens != eos).sum(1).max()) + 1]


def main() -> None:
    parser = training_parser(__doc__, "text_encoder", steps=1500, batch_size=64, learning_rate=2e-3)
    add_scene_options(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    scenes = load_scenes(args.vae, tokenizer, args.scenes, args.cache, args.device)
    modules = nn.ModuleDict(
        {
            "text_encoder": build_text_encoder(tokenizer, args.device),
            "paraphraser": Paraphraser(len(tokenizer)).to(args.device),
        }
    )
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        optimizer="muon",
        schedule="cosine",
        warmup_steps=100,
    )
    loss = build_loss(modules, scenes, tokenizer.eos_token_id, args.batch_size, args.seed, args.device)
    identity = scene_identity(args, tokenizer)
    run_training(modules, loss, options, args.out, "text encoder", identity)
    modules["text_encoder"].save_pretrained(args.out / "model")
    print(f"saved {args.out / 'model'}")


if __name__ == "__main__":
    main()
