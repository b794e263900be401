"""The native CPU library: `native` loads it, `four_bit` calls it."""
