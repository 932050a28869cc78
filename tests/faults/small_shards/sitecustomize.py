"""Python imports this in every process that finds it: shards of a few kilobytes, in windows of at most four."""

import osler.data.config
import osler.data.shards

osler.data.config.FIRST_WINDOW_TOKENS = 4096
osler.data.shards.SHARD_TOKENS = osler.data.shards.FIRST_SHARD_TOKENS = 4096

import osler.data.order  # noqa: E402 - after what it reads

osler.data.order.WINDOW_SHARDS = 4
