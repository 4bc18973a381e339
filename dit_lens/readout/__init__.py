"""Reading heads: screening of weights, attention synopsis, QK and OV circuits."""
