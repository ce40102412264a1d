# Table 2, row 6, and Table 3, row 5 (ours): all three. Paper: 40.9.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
