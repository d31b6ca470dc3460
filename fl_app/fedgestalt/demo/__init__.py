"""The main job in small: one machine plays a consortium of hospitals, on FLARE.

Only here does one program see the data of several hospitals: it deals a cohort to them, lets them
train and match through FLARE as separate participants, and afterwards compares the outcome with
what pooling all data, and staying alone, would have given.
"""
