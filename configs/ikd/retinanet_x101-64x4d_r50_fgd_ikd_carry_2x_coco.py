# Perturbations that are kept from visit to visit: one gradient of the teacher a step, from the forward
# that is distilled, and no forward beyond it. Half the original resolution at 4 bits: about 13.6 GB of host memory for COCO, for
# each process. Crops on multiples of 8 pixels, the teacher's finest stride, keep what is kept in step with the teacher's grid.
_base_ = "./retinanet_x101-64x4d_r50_fgd_ikd_2x_coco.py"
model = dict(
    adv=dict(attack=dict(mode="carry", memory=dict(bits=4, stride=2, resolution="original"))),
    augment=dict(crop_align=8),
)
