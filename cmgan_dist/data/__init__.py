"""Bytes -> batches. The journey of a sample through these files, in the order of the calls:

    manifest.py   what a data set holds: its splits, their shards, its classes
    store.py      where its files are: a folder, or a URL read through fsspec (source.py) and kept in a bounded folder
                  of the node (cache.py)
    order.py      which (shard, index) each row of global batch t is, by arithmetic alone
    index.py      where in the shard that sample and its members lie
    tar.py        the members of a sample, where only a walk through the tar's headers finds them
    reader.py     the members read by their offset: a Sample
    sample.py     what a Sample is: members parsed, nothing decoded yet
    judge.py      whether it is one that its data set can use
    image.py      its picture decoded, cropped and resized to pixels, unless its headers (jpeg.py) ask for too much
    batch.py      its arrays in a row of a Batch
    stream.py     all of this for a rank, from any position on, in worker processes: what training iterates over

Evaluation takes the samples of a split in order instead (`batch.eval_batches`). Packing, in the package ``shards``,
goes the way back: raw pairs -> tars, index sidecars and a manifest.
"""
