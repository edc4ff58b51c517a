"""Which way a product is applied: the rule, what is prepared for it, and tuning on request."""
