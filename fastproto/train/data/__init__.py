"""Data sets: what is trained on, what is tested on, and how images come from there to the device."""

from fastproto.train.data.dataset import Dataset as Dataset
from fastproto.train.data.sources import load as load
from fastproto.train.data.streamed import BrokenImage as BrokenImage
from fastproto.train.data.streamed import Images as Images
from fastproto.train.data.streamed import Streamed as Streamed
from fastproto.train.data.streamed import batches as batches
from fastproto.train.data.streamed import squares as squares
