"""What a run would be like on more ranks than there are here: published formulas, fed by a measured run."""
