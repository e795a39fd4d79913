"""One file a metric family; these modules know no method."""
