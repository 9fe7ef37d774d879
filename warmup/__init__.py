"""All that happens between start and ready: build, measure, allocate, run every bucket, freeze, report."""
