"""Pages to look at and listen to: self-contained HTML of runs, comparisons, codecs and shards."""
