# Table 2, row 1, and Table 3, row 1 (no augmentation): FGD on RetinaNet without flipping. Paper: 40.3.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
model = dict(adv=None, augment=None, stop_at=None)
