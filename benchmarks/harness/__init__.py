"""What all benchmarks share: declare, contenders, verify, clock, record, then show and compare; command joins them."""
