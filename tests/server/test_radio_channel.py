import math

import pytest

from hafl_app.server.radio_channel import PAPER_DISTANCES_M, Channel


class TestChannel:
    def test_one_rate_by_hand(self):
        # SNR 0 dB: 1 bit/s for every Hz.
        channel = Channel(
            bandwidth_hz=2e6,
            transmit_power_dbm=20.0,
            noise_dbm_per_hz=-170.0,
            path_loss_db_at_1km=120.0,
            path_loss_exponent=3.0,
        )
        snr_db = 20 - 120 - (-170 + 10 * math.log10(2e6))
        distance = 1000 * 10 ** (snr_db / 30)  # where the path loss has eaten it up

        assert channel.path_loss_db(1000.0) == 120
        assert channel.path_loss_db(10_000.0) == pytest.approx(150)
        assert channel.rate_bps(distance) == pytest.approx(2e6)
        assert channel.rate_bps(1000.0) == pytest.approx(2e6 * math.log2(1 + 10 ** (snr_db / 10)))

    def test_further_is_slower_and_more_power_faster(self):
        rates = [Channel().rate_bps(d) for d in PAPER_DISTANCES_M]
        assert rates == sorted(rates, reverse=True)
        assert 4.0 < rates[0] / rates[-1] < 4.2
        assert Channel(transmit_power_dbm=26.0).rate_bps(1500.0) > Channel().rate_bps(1500.0)

    def test_the_papers_ten_distances_are_used_again(self):
        assert PAPER_DISTANCES_M == (1100, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000)
        assert [Channel().distance_m(i) for i in (0, 9, 10, 23)] == [1100, 2000, 1100, 1400]

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"bandwidth_hz": 0.0}, "bandwidth_hz=0.0: expected 1 to 1e\\+12"),
            ({"bandwidth_hz": math.nan}, "bandwidth_hz=nan"),
            ({"transmit_power_dbm": math.inf}, "transmit_power_dbm=inf: expected -100 to 100"),
            ({"noise_dbm_per_hz": 3.0}, "noise_dbm_per_hz=3.0: expected -300 to 0"),
            ({"path_loss_db_at_1km": -1.0}, "path_loss_db_at_1km=-1.0"),
            ({"path_loss_exponent": 0.5}, "path_loss_exponent=0.5: expected 1 to 10"),
            ({"distances_m": ()}, "distances_m is empty"),
            ({"distances_m": (1100.0, 0.0)}, "distances_m=0.0: expected 1 to 1e\\+09"),
        ],
    )
    def test_values_out_of_range_are_refused(self, setting, message):
        with pytest.raises(ValueError, match=message):
            Channel(**setting)

    def test_nothing_in_range_overflows(self):
        for power, noise in ((100.0, -300.0), (-100.0, 0.0)):
            for distance in (1.0, 1e9):
                rate = Channel(
                    transmit_power_dbm=power, noise_dbm_per_hz=noise, path_loss_exponent=10.0
                ).rate_bps(distance)
                assert 0 <= rate < math.inf
