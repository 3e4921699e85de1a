//! Where a trace's table goes in a data set: a folder for each host and day, as engines expect it of partitioned tables.
//!
//! Owns [`place`]. Folders are named `key=value` (the convention of Hive, which many engines read), the file after the trace and its start, so
//! that no trace takes the place of another.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use trapline_trace::{Catalog, Meta, Reader};

const NS_PER_DAY: u64 = 24 * 3600 * 1_000_000_000;

/// The file in `folder` for the trace `input`. Its folder is there then.
pub(crate) fn place(folder: &Path, input: &Path) -> Result<PathBuf> {
    let place = within(folder, input, &meta(input)?);
    let folder = place.parent().unwrap_or(folder);
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    Ok(place)
}

fn meta(input: &Path) -> Result<Meta> {
    let mut reader = Reader::open(input)?;
    let mut catalog = Catalog::new();
    while catalog.meta.is_none()
        && let Some(chunk) = reader.next_chunk()?
    {
        catalog.take(chunk);
    }
    Ok(catalog.meta.unwrap_or_default())
}

fn within(folder: &Path, input: &Path, meta: &Meta) -> PathBuf {
    let stem = input.file_stem().unwrap_or_default().to_string_lossy();
    let (year, month, day) = date(meta.started_unix_ns / NS_PER_DAY);
    folder
        .join(format!("host={}", escaped(&meta.host)))
        .join(format!("date={year:04}-{month:02}-{day:02}"))
        .join(format!("{stem}-{}.parquet", meta.started_unix_ns))
}

/// Year, month and day of the Gregorian calendar, of a number of days from 1970. Years are counted from March, so that the day that some lack is their last.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_FROM_YEAR_0: u64 = 719_468;
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let days = days + DAYS_FROM_YEAR_0;
    let (era, of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (400 * era + year + u64::from(month <= 2), month, day)
}

/// A value of a partition: what may mean something else in a path is written as `%` and two hexadecimal digits. Nobody's name is the convention's word for it.
fn escaped(value: &str) -> String {
    if value.is_empty() {
        return "__HIVE_DEFAULT_PARTITION__".to_owned();
    }
    value.bytes().fold(String::new(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_the_dates_of_the_calendar() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_786, (2026, 11, 29)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn a_file_lies_under_its_host_and_day_and_no_other_takes_its_place() {
        let of = |host: &str, started_unix_ns| {
            let meta = Meta { host: host.into(), started_unix_ns, ..Meta::default() };
            within(Path::new("calls"), Path::new("a/trapline.data"), &meta).display().to_string()
        };
        assert_eq!(of("web-1.lan", NS_PER_DAY), "calls/host=web-1.lan/date=1970-01-02/trapline-86400000000000.parquet");
        assert_eq!(of("a/b=c", 1), "calls/host=a%2Fb%3Dc/date=1970-01-01/trapline-1.parquet");
        assert_eq!(of("", 1), "calls/host=__HIVE_DEFAULT_PARTITION__/date=1970-01-01/trapline-1.parquet");
        assert_ne!(of("", 1), of("", 2));
    }
}
