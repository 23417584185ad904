"""What is kept between forward and backward: which results of a layer, in which form and where."""
