"""Runs a frozen vision tower over an Energon data set once, and writes its features as a new data set to train on.

    hybridprune features experiment=demo --data runs/demo/data/train --out runs/demo/features/train
    hybridprune features --checkpoint runs/demo --data runs/demo/data/train --out features/train

The tower comes from --checkpoint, or without it from model.init_checkpoint of the named configuration; frames are
chosen as that configuration's data group says. Samples keep their keys, conversations and everything else; in the place
of each video stands what the tower and the pixel shuffle made of its frames. Name the new folder as data.train or
data.validation: the projector and the language model train on it with the same loss. The same command again after a
kill continues after the last finished shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.one_line import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.config import Config
    from hybridprune_megatron.config.features import FeaturesInfo
    from hybridprune_megatron.data.video import DecodedVideo, FrameSampling
    from hybridprune_megatron.models.video_language_model import VideoLanguageModel


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="hybridprune features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="Energon data set folder with videos")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new data set; must not exist")
    parser.add_argument("--checkpoint", help="folder of a run (newest checkpoint), of one, or bare weights")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="stored features (default %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=128, help="frames in one pass of the tower (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, or changes to a run's own")
    options = parser.parse_intermixed_args(argv)
    wrong = [override for override in options.overrides if "=" not in override]
    if wrong:
        parser.error(f"{wrong[0]!r} is not key=value")
    if options.frames < 1:
        parser.error(f"--frames {options.frames}: at least 1")
    return options


@one_line_errors("features")
def main(argv: list[str]) -> None:
    """Computes and writes; a wrong argument ends it with one line and code 2."""
    from hybridprune_megatron.config.data_sets import shard_counts

    options = parse_arguments(argv)
    check_out(options.out, options.data)
    shards = source_shards(options.data)
    encoder = FeatureEncoder(*load(options.checkpoint, options.overrides), options.dtype, options.frames)
    left = write_features(options.data, options.out, shards, encoder)
    samples = sum(shard_counts(options.out, "--out").values())
    print(f"{options.out}: {samples} samples, {left} videos that cannot be decoded left as they are")


def check_out(out: Path, data: Path) -> None:
    """The new data set's folder is not there, and what lies at the place of its unfinished one is that.

    Raises:
        ValueError: either is something else, or lies in the data set that is read.
    """
    from hybridprune_megatron.config.features import FEATURES_FILE
    from hybridprune_megatron.config.outputs import check_apart

    check_apart(out, [data])
    if os.path.lexists(out):
        raise ValueError(f"--out={out} exists: choose another folder, or remove it first")
    begun = unfinished(out)
    if os.path.lexists(begun) and not (begun / FEATURES_FILE).is_file():
        raise ValueError(f"--out={out}: {begun} is not an unfinished data set of this command; choose another folder")


def unfinished(out: Path) -> Path:
    """Where a data set lies until it is complete."""
    return out.with_name(f".{out.name}.partial")


def source_shards(folder: Path) -> dict[str, int]:
    """Number of samples by shard of an Energon data set.

    Raises:
        ValueError: the folder is none, or holds features already.
    """
    from hybridprune_megatron.config.data_sets import shard_counts
    from hybridprune_megatron.config.features import FEATURES_FILE

    if (folder / FEATURES_FILE).is_file():
        raise ValueError(f"--data={folder} holds features already: give the data set with the videos")
    return shard_counts(folder, "--data")


def load(checkpoint: str | None, overrides: list[str]) -> tuple[VideoLanguageModel, Config]:
    """The model whose tower is meant, in one process, and its configuration.

    Raises:
        ValueError: there are no weights, or the configuration has no frames or trains the tower.
    """
    from hybridprune_megatron.config import load_config
    from hybridprune_megatron.config.checkpoint_folder import RUN_FILE
    from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint

    named = checkpoint or load_config(overrides).model.init_checkpoint
    if named is None:
        raise ValueError("model.init_checkpoint=null: name the weights of the tower by it or by --checkpoint")
    path = find_checkpoint(named)
    if checkpoint is None and (path / RUN_FILE).is_file():
        raise ValueError(f"model.init_checkpoint={named} is a run's, with a configuration: give it as --checkpoint")
    cfg = checkpoint_config(path, overrides)
    if cfg.model.vision is None:
        raise ValueError(f"model {cfg.model.name} has no vision tower (model.vision=null)")
    if cfg.model.trainable.vision:
        raise ValueError("model.trainable.vision=true: features of a tower that learns are soon wrong; set it to false")
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    # After all that can be wrong: this takes half a minute to import.
    from hybridprune_megatron.engine.load import load_model

    return load_model(path, cfg), cfg


@dataclass
class VideoSample:
    """A sample as stored, and its decoded videos by part."""

    key: str
    parts: dict[str, bytes]
    decoded: dict[str, DecodedVideo]


class FeatureEncoder:
    """Decodes videos and runs the tower over their frames.

    Args:
        model: has the tower.
        cfg: uses ``data`` and ``model.vision``.
        dtype: of stored features, bf16 or fp32.
        frames_per_pass: frames in one pass of the tower.

    Attributes:
        info: goes into every features part.
        left: videos so far that cannot be decoded.
    """

    def __init__(self, model: VideoLanguageModel, cfg: Config, dtype: str, frames_per_pass: int) -> None:
        import torch

        from hybridprune_megatron.config.features import FeaturesInfo
        from hybridprune_megatron.data.video import FrameSampling
        from hybridprune_megatron.models.video_language_model import tower_fingerprint

        vision, data = cfg.model.vision, cfg.data
        assert vision is not None, "load() refuses a model without vision"
        assert model.vision_model is not None, "the one stage of a model with vision has the tower"
        self.tower, self.shuffle = model.vision_model, model.pixel_shuffle
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        self.frames_per_pass = frames_per_pass
        self.sampling: FrameSampling = FrameSampling(data.sampling, data.num_frames, data.fps, data.max_frames)
        self.info: FeaturesInfo = FeaturesInfo(
            tower_fingerprint(self.tower),
            vision.frame_size,
            vision.tokens_per_frame,
            vision.projector_input_size,
            self.sampling.overrides,
            dtype,
        )
        self.left = 0

    def members(self, shard: Path, progress: Callable[[int], Any]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the new shard, in the order of the old one.

        Args:
            progress: gets the number of samples that are done.

        Raises:
            ValueError: no sample of the shard can be read; some that cannot are named and left out.
        """
        from hybridprune_megatron.data.shards import read_shard

        waiting: list[VideoSample] = []
        key = None
        for key, parts in read_shard(shard):
            waiting.append(VideoSample(key, parts, self._decode(parts)))
            if sum(len(video.seconds) for each in waiting for video in each.decoded.values()) >= self.frames_per_pass:
                yield from self._finish(waiting)
                progress(len(waiting))
                waiting = []
        yield from self._finish(waiting)
        progress(len(waiting))
        if key is None:
            raise ValueError(f"{shard}: none of its samples can be read; take the shard out of the data set")

    def _decode(self, parts: dict[str, bytes]) -> dict[str, DecodedVideo]:
        """The videos of a sample by part; one that cannot be decoded stays, for training to count as bad."""
        from hybridprune_megatron.data.shards import video_parts
        from hybridprune_megatron.data.stored_media import IMAGE_EXTENSIONS
        from hybridprune_megatron.data.video import decode_video

        decoded = {}
        for part in video_parts(parts):
            if part.rpartition(".")[2] in IMAGE_EXTENSIONS:
                raise ValueError("a sample shows an image, of which no features are stored: use the data set as it is")
            try:
                decoded[part] = decode_video(parts[part], self.sampling, self.info.frame_size)
            except ValueError:
                self.left += 1
        return decoded

    def _finish(self, samples: list[VideoSample]) -> Iterator[tuple[str, bytes]]:
        import torch

        from hybridprune_megatron.data.features import FEATURES_EXTENSION, features_part

        videos = [video for sample in samples for video in sample.decoded.values()]
        each: Iterator[Tensor] = iter(())
        if videos:
            features = self._encode(torch.cat([video.frames for video in videos]))
            each = iter(features.split([len(video.seconds) for video in videos]))
        for sample in samples:
            for part, data in sample.parts.items():
                video = sample.decoded.get(part)
                if video is None:
                    yield f"{sample.key}.{part}", data
                    continue
                index_of = {time: index for index, time in enumerate(video.video_seconds)}
                indices = [index_of[time] for time in video.seconds]
                number = part.rpartition(".")[0]
                name = f"{number}.{FEATURES_EXTENSION}" if number else FEATURES_EXTENSION
                yield f"{sample.key}.{name}", features_part(next(each), video.video_seconds, indices, self.info)

    def _encode(self, pixels: Tensor) -> Tensor:
        """[F, M, C] on the CPU, from uint8 [F, 3, S, S]."""
        import torch

        from hybridprune_megatron.models.encoder import frame_tokens

        device = next(self.tower.parameters()).device
        passes = [
            frame_tokens(self.tower, chunk.to(device), self.shuffle, False).to(self.dtype).cpu()
            for chunk in pixels.split(self.frames_per_pass)
        ]
        return torch.cat(passes)


def write_features(source: Path, out: Path, shards: dict[str, int], encoder: FeatureEncoder) -> int:
    """Writes the data set; it appears under its name only when it is complete.

    Returns:
        The number of videos, of the shards written now, that cannot be decoded.

    Raises:
        ValueError: what an earlier, unfinished call left is of another tower, sampling or source.
    """
    from tqdm import tqdm

    from hybridprune_megatron.config.features import FEATURES_FILE
    from hybridprune_megatron.config.json_text import read_json
    from hybridprune_megatron.config.outputs import MARKER
    from hybridprune_megatron.data.shards import prepare_dataset, write_shard

    partial = unfinished(out)
    description = asdict(encoder.info) | {"source": _identity(source)}
    known = partial / FEATURES_FILE
    if not known.is_file():
        partial.mkdir(parents=True, exist_ok=True)
        known.with_suffix(".tmp").write_text(json.dumps(description, indent=2) + "\n")
        known.with_suffix(".tmp").replace(known)
    elif read_json(known) != description:
        raise ValueError(
            f"{partial} was started from another tower, sampling, dtype or data set: remove it to start over"
        )
    done = [name for name in shards if (partial / name).is_file()]
    with tqdm(total=sum(shards.values()), initial=sum(shards[name] for name in done), unit="sample") as bar:
        for name in shards:
            if name not in done:
                write_shard(partial / name, encoder.members(source / name, bar.update))
    shutil.rmtree(partial / ".nv-meta", ignore_errors=True)
    prepare_dataset(partial, shards, "train")
    # Which shards are held out stays as it was.
    shutil.copy(source / ".nv-meta" / "split.yaml", partial / ".nv-meta" / "split.yaml")
    for file in source.iterdir():
        # What a link leads to is not part of the data set.
        if file.is_file() and not file.is_symlink() and ".tar" not in file.suffixes and file.name != MARKER:
            shutil.copy(file, partial / file.name)
    partial.rename(out)
    return encoder.left


def _identity(source: Path) -> str:
    """A short name for a data set: another shard or another preparation gives another one."""
    meta = source / ".nv-meta"
    files = [file for file in (meta / ".info.json", meta / "index.uuid") if file.is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
